"""How good a model is: perplexity, likelihood of answers, zero-shot tasks, distance from the dense model.

Imports `walk`, `text` and `disk`; knows nothing of plans and pruning.
"""
