"""The packed format: read, written, checked, unpacked, loaded as a model, and timed.

Knows nothing about reports and steps: `steps/pack.py` makes and unpacks whole directories.
"""
