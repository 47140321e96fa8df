"""Gradients of the dense model with one block in memory at a time, and the file that keeps them.

Imports `walk` and what that is built on.
"""
