"""Packed models from end to end: made, turned back, loaded, generating text, and timed side by side.

Imports `runtime`, which multiplies, and `run`, which writes directories; knows nothing of searches and of the command
line.
"""
