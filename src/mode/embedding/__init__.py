"""Captions to unit vectors: `lsa` (needs no weights), `transformers` and `open_clip` text towers."""
