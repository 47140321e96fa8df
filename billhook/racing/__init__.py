"""Racing: candidate plans are tried in full on held-out calibration windows, and the best is used.

Serves `--allocator auto`, hyperparameters given as `auto` (`--allocator atp --set beta=auto`) and `billhook search`.
"""
