"""The engine: tensors packed as bitmask and values, and the kernels that multiply with them.

Imports nothing of Billhook but `errors` and `disk`.
"""
