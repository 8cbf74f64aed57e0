"""Shards and tables of image-caption pairs: manifest, byte-offset index, account of bad members, export."""
