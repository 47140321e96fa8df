"""All knowledge of model architectures: stacks of blocks, layers, experts and routers, configurations."""
