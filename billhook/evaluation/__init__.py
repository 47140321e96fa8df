"""Evaluation: perplexity, likelihood of continuations, zero-shot tasks, comparison with the dense model."""
