"""Output for people: report.json, the model card, report.html, and pictures. Opens no model."""
