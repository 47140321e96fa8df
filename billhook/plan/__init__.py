"""What becomes of each layer: specs, plans, budgets, and the table of metrics from which allocators decide. No
torch."""
