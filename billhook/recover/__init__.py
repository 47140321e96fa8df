"""Making up for what was lost: tuning what is left of a model."""
