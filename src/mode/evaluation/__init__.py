"""Zero-shot classification and retrieval of several models, and of their mixture, on task folders."""
