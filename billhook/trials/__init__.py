"""Plans tried on a model: pruned in full, scored on held-out calibration windows, the weights restored."""
