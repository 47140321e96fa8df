"""Tasks, one file each, named as the pipelines of transformers.

A task defines which class opens a model, how a SOURCE becomes batches, and how outputs give loss and scores.
"""

from billhook.registry import Registry

TASKS = Registry(
    "task",
    {
        "image-text-to-text": "billhook.tasks.image_text_to_text:TASK",  # before text-generation: some are in both
        "text-generation": "billhook.tasks.text_generation:TASK",
        "fill-mask": "billhook.tasks.fill_mask:TASK",
        "image-classification": "billhook.tasks.image_classification:TASK",
        "feature-extraction": "billhook.tasks.feature_extraction:TASK",
        "text2text-generation": "billhook.tasks.text2text_generation:TASK",
        "automatic-speech-recognition": "billhook.tasks.automatic_speech_recognition:TASK",
    },
    plugins=True,
    mark="auto_class",
)
