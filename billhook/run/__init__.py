"""One run: what is asked for, what was done, its unfinished directory, and the directory that it leaves.

Imports `pruning` and `reports`; knows nothing of searches and packed models.
"""
