"""The built-in data set: drawn glyphs with captions, and tasks in a font that training never sees."""
