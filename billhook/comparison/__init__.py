"""A grid of methods on one model, and finished runs side by side: run, kept in compare.json, shown.

May import everything but `demo` and `cli`.
"""
