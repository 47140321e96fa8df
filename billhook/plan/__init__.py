"""Specs, plans, budgets, and the table of metrics from which allocators make plans. No torch."""
