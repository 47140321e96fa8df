"""Output for people: report.json, the model card, report.html, and pictures, without loading a model."""
