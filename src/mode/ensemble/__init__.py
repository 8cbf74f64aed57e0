"""Experts and their conditions as one model: routing weights from a task's words, and what is done with them."""
