"""All that Billhook knows about model architectures: blocks, prunable layers, conventions of configs."""
