"""One block of a model at a time: read from disk, run with its own arguments, watched, and compared with the dense one.

Imports `arch`, `stats`, `disk` and `parallel`; `billhook.walk` is built on it.
"""
