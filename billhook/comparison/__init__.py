"""`billhook compare`: many ways to prune one model, kept in compare.json, and finished runs side by side."""
