"""All that Billhook knows about model architectures.

Stacks of blocks, prunable layers as [out, in] views, experts and routers, and the conventions of configurations.
"""
