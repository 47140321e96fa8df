"""Plans tried on held-out calibration windows: the search for allocator and knob, and `--allocator auto`.

Imports `run`, `pruning` and `measuring`; `job` imports it for `auto`.
"""
