"""What goes into a model and what good means, a file a task, named as the pipelines of transformers are.

A task says which class opens a model, how a SOURCE becomes batches, and how loss and scores come from the outputs.
"""

from billhook.registry import Registry

TASKS = Registry(
    "task", {"text-generation": "billhook.tasks.text_generation:TASK", "fill-mask": "billhook.tasks.fill_mask:TASK"}
)
