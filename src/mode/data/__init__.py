"""Image-caption pairs: `shards` (where they lie), `loading` (what training reads), `glyphs` (the built-in data)."""
