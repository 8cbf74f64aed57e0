"""Vectors to fine and coarse clusters, the assignment of every pair, and the words that name a cluster."""
