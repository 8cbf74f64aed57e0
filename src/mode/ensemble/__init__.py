"""The experts as one model: a router weighs them by a task's words, an ensemble predicts."""
