"""Zero-shot classification and retrieval of several models, and of their ensembles, on task folders."""
