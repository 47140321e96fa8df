"""The likeliest classes of images, by a dense or a packed classifier."""

import torch
from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.architectures.config import call_options
from billhook.engine.batch import model_inputs
from billhook.errors import JobError
from billhook.tasks.image_classification import classes
from billhook.tasks.image_inputs import Images

Classes = list[tuple[str, float]]  # names with probabilities, the likeliest first


@pinned
def likeliest(model: PreTrainedModel, images: Images, count: int = 5) -> list[Classes]:
    """The `count` likeliest classes of each image; raises JobError for predictions that are NaN.

    Probabilities are those of a softmax, or, where an image may have several classes, of each class by itself.
    """
    names, found = classes(model), list[Classes]()
    several = model.config.problem_type == "multi_label_classification"
    for batch in images.batches(None):
        with torch.no_grad():
            logits = model(**model_inputs(model, batch), **call_options(model)).logits.float()
        if logits.isnan().any():
            raise JobError("The model's predictions are NaN: check its weights, or try another --dtype.")
        best = (logits.sigmoid() if several else logits.softmax(-1)).topk(min(count, logits.shape[-1]))
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            found.append([(names[number], value) for number, value in zip(numbers, values, strict=True)])
    return found
