"""Shards of image-caption pairs: manifest, byte-offset index, the stream that training reads, and the built-in data."""
