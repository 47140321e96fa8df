"""What the table is filled with: spectra, statistics of scores, losses and error curves of every layer.

Each function is named in `billhook.plan.metrics`. Imports `walk`, `criteria` and `evaluation`; knows nothing of plans
and allocators.
"""
