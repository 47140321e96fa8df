"""What a pruned model is trained for, one small file for each objective.

An objective is a pure function `(student, teacher, batch, *, options) -> loss`, a scalar that autograd can
differentiate. `student` and `teacher` are functions from a batch to `billhook.recovery.outputs.Outputs`: predictions,
labels and hidden states; the teacher is the dense model, without gradients. What is named in `needs` is there:
`teacher`, `hidden` (the hidden states of both), `written` (windows that the student wrote itself, under the key
`written` of the batch). Adding an objective is one file and one line here; the contract tests then run on it.
"""

from billhook.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "kl+hidden": "billhook.recovery.objectives.kl_hidden:kl_hidden",
        "kl": "billhook.recovery.objectives.kl:kl",
        "hidden": "billhook.recovery.objectives.hidden:hidden",
        "text": "billhook.recovery.objectives.text:text",
        "mixed": "billhook.recovery.objectives.mixed:mixed",
    },
    plugins=True,
)
