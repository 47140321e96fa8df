"""image-classification: models such as ViT, Swin and ConvNeXt, scored by the class of each image.

Images are preprocessed by the checkpoint's own image processor. Labels are needed for accuracy and gradients only;
images without labels are enough for calibration, and are compared with the dense model's predictions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import call_options
from billhook.engine.batch import LABELS, Batch, model_inputs
from billhook.errors import BillhookError
from billhook.evaluation.divergence import KL, Divergence
from billhook.images.labels import UNKNOWN
from billhook.tasks.base import Drawing, Home, Progress, Samples
from billhook.tasks.image_inputs import Images, image_samples


@dataclass(frozen=True)
class ImageClassification:
    """A batch is {"pixel_values": float [images, channels, height, width], "labels": class numbers, -1 if unknown}."""

    protocol: ClassVar[str] = "class of each image, by the checkpoint's own preprocessing"
    unit: ClassVar[str] = "image"
    divergence: ClassVar[Divergence] = KL
    stacks: ClassVar[str] = "all"
    name: str = "image-classification"
    auto_class: str = "AutoModelForImageClassification"

    def samples(
        self, source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, progress: Progress = lambda step: None
    ) -> Samples:
        """Images of a SOURCE (`billhook.images.corpus`), or pixel values and perhaps labels that are given."""
        return image_samples(source, model, home, drawing, classes(model))

    def inputs(self, source: Any, model: PreTrainedModel, home: Home) -> Images:
        """The images of a SOURCE that are scored."""
        return Images.of(source, home, model, classes(model), "evaluation")

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for pixel values [images, channels, height, width] without labels."""
        return {"pixel_values": inputs}

    def scored(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [images, 1, classes] and labels [images, 1]."""
        labels = batch[LABELS] if LABELS in batch else logits.new_full((len(logits),), UNKNOWN).long()
        return logits[:, None], labels[:, None].to(logits.device)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The model's own loss on the labels of the images; raises BillhookError where there are none."""
        labels = batch.get(LABELS)
        if labels is None or bool((labels == UNKNOWN).any()):
            raise BillhookError(
                "A loss needs the label of every image: name the folders of the images after the model's classes, or "
                "use a criterion that reads no gradients."
            )
        inputs = {**model_inputs(model, batch), LABELS: labels.to(model.device)}
        loss: Tensor = model(**inputs, **call_options(model)).loss
        return loss


def classes(model: PreTrainedModel) -> Mapping[int, str]:
    """The names of the model's classes by number."""
    return {int(number): str(name) for number, name in (model.config.id2label or {}).items()}


TASK = ImageClassification()
