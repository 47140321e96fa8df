"""Recovery: tuning the remaining weights of a pruned model."""
