"""Trying plans on a model and scoring them on held-out calibration windows."""
