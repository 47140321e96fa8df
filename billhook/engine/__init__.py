"""The walk through a model block by block, what is observed on the way, and the loop that applies a plan."""
