"""Kernels for packed weights (a bitmask and the kept values), and the layers that multiply with them.

Knows nothing about files: `packed` reads and writes those.
"""
