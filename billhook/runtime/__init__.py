"""Kernels for packed weights (a bitmask and the kept values) in memory, and the layers that multiply with them."""
