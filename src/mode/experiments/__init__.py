"""Experiments: which runs, what they cost, what came of them, and what may be said about it. Nothing here runs them."""
