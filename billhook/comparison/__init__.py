"""`billhook compare`: many ways to prune one model, stored in compare.json; and finished runs side by side."""
