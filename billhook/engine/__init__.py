"""The walk through a model block by block, the statistics it collects, and the loop that applies a plan."""
