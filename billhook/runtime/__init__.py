"""Sparse weights packed as bitmask and values, and the engine that multiplies with them."""
