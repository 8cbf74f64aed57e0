"""Zero-shot classification and retrieval of several models, and of their router, on task folders."""
