"""Recipes: complete ways to prune, by name: a criterion, an allocator, their options, and whether blocks are tuned.

`fast`, `good` and `best` are ours, each better and slower than the one before. `good` is the default: the solver `admm`
with the allocation that `auto` chooses on held-out calibration text; `best` tunes every block as well
(`--refine blocks`).

`wanda`, `sparsegpt`, `gblm`, `alphapruning`, `atp` and `owl` are the published methods with their published defaults;
ATP's β is searched, as published, but on held-out calibration text and not on the test text. Where a paper has other
values for a model or sparsity, they are METHOD[/MODEL][/CRITERION]@PERCENT, such as `alphapruning/llama-2-7b@70`, which
also gives the sparsity; without a criterion the setting is for Wanda.

`wanda-vision`, `alphapruning-vision`, `atp-vision` and `gblm-vision` are these methods as published for image
classifiers: the inputs of a block are those of the dense model (`--prefix dense`), weights are compared over the layer
(GBLM: the row), and AlphaPruning maps `alpha_mid` of each matrix with epsilon 0.2. The published code draws images with
replacement through the augmentation of the training; here they go through the checkpoint's own preprocessing. Query,
key and value, which are one matrix there, are three in `transformers`, each with its own alpha and threshold.

`--recipe NAME` chooses one; single options (`--criterion`, `--allocator`, `--set`, `--sparsity`, `--refine`) override
it. A criterion that is given without a recipe is used with the uniform allocation. With an N:M pattern, which GPUs can
run only where every layer has it, `good` and `best` are uniform, and recipes that are an allocation are refused.
`--published` also counts zeros and draws windows as the released code of the papers does.

Sources: AlphaPruning's published scripts (epsilon by model and criterion at 70 %), FARMS' scripts (epsilon of its
AlphaPruning baseline at 75, 80 and 85 %), OWL's README, DLP's paper.

Limits: the published values for a model or sparsity were chosen on the test text of WikiText-2, for these models. For
other models they are a starting point.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from billhook.errors import BillhookError
from billhook.plan.allocators import AUTO
from billhook.plan.plan import Plan
from billhook.registry import hint

DEFAULT = "good"


@dataclass(frozen=True)
class Recipe:
    """What a run does, apart from its model and text.

    `options` are the allocator's; those of the criterion are its defaults. `sparsity` is the one that published values
    are for. `group` (None: the criterion's own) compares weights within a row or the layer; `prefix` says whose
    outputs are the inputs of the next block.
    """

    criterion: str
    allocator: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    refine: str = "none"
    sparsity: float | None = None
    group: Literal["row", "layer"] | None = None
    prefix: Literal["pruned", "dense"] = "pruned"


_EPSILON_70 = {  # model: epsilon for magnitude, wanda, sparsegpt
    "llama-7b": (0.3, 0.2, 0.2),
    "llama-13b": (0.5, 0.3, 0.3),
    "llama-30b": (0.4, 0.3, 0.3),
    "llama-65b": (0.4, 0.3, 0.3),
    "llama-2-7b": (0.5, 0.3, 0.2),
    "llama-2-13b": (0.4, 0.3, 0.3),
    "llama-2-70b": (0.4, 0.3, 0.3),
}
_EPSILON_HIGH = {  # model: criterion: epsilon at 75, 80, 85 %
    "llama-7b": {"magnitude": (0.3, 0.2, 0.15), "wanda": (0.2, 0.2, 0.1), "sparsegpt": (0.2, 0.1, 0.15)},
    "llama-13b": {"magnitude": (0.45, 0.3, 0.15), "wanda": (0.3, 0.3, 0.2), "sparsegpt": (0.3, 0.2, 0.2)},
}
_CRITERIA = ("magnitude", "wanda", "sparsegpt")


def _alphapruning(epsilon: float) -> dict[str, Any]:
    return {"metric": "alpha_peak", "epsilon": epsilon, "mapping": "block"}


def _of_models() -> dict[str, Recipe]:
    """AlphaPruning's published epsilon by model, criterion and sparsity."""
    found = {}
    for model, epsilons in _EPSILON_70.items():
        settings = [(70, criterion, epsilon) for criterion, epsilon in zip(_CRITERIA, epsilons, strict=True)]
        for criterion, higher in _EPSILON_HIGH.get(model, {}).items():
            settings += [(per_cent, criterion, epsilon) for per_cent, epsilon in zip((75, 80, 85), higher, strict=True)]
        for per_cent, criterion, epsilon in settings:
            name = f"alphapruning/{model}" + ("" if criterion == "wanda" else f"/{criterion}") + f"@{per_cent}"
            source = ("Lu et al. 2024" if per_cent == 70 else "Hu et al. 2025 (FARMS)") + ", published scripts"
            options = _alphapruning(epsilon)
            found[name] = Recipe(criterion, "alphapruning", source, options, sparsity=per_cent / 100)
    return found


_OWL = {"m": 5.0, "lam": 0.08}
_VISION: dict[str, Any] = {"group": "layer", "prefix": "dense"}
RECIPES: dict[str, Recipe] = {
    "fast": Recipe("wanda", "uniform", "masks alone, in minutes"),
    "good": Recipe("admm", AUTO, "kept weights solved for, allocation chosen on held-out text"),
    "best": Recipe("admm", AUTO, "as good, and every block tuned", refine="blocks"),
    "wanda": Recipe("wanda", "uniform", "Sun et al. 2023"),
    "sparsegpt": Recipe("sparsegpt", "uniform", "Frantar & Alistarh 2023"),
    "gblm": Recipe("gblm", "uniform", "Das et al. 2023"),
    "alphapruning": Recipe("wanda", "alphapruning", "Lu et al. 2024", _alphapruning(0.3)),
    "atp": Recipe("wanda", "atp", "Huang et al. 2025", {"beta": AUTO}),
    "owl": Recipe("wanda", "owl", "Yin et al. 2024", _OWL),
    "wanda-vision": Recipe("wanda", "uniform", "Sun et al. 2023, code for image classifiers", **_VISION),
    "alphapruning-vision": Recipe(
        "wanda",
        "alphapruning",
        "Lu et al. 2024, code for image classifiers",
        {"metric": "alpha_mid", "epsilon": 0.2, "mapping": "layer"},
        **_VISION,
    ),
    "atp-vision": Recipe("wanda", "atp", "Huang et al. 2025, image classifiers", {"beta": AUTO}, **_VISION),
    "gblm-vision": Recipe("gblm", "uniform", "Das et al. 2023, image classifiers", prefix="dense"),
    "alphapruning@70": Recipe("wanda", "alphapruning", "Lu et al. 2024, most models", _alphapruning(0.3), sparsity=0.7),
    "owl@70": Recipe("wanda", "owl", "Yin et al. 2024, README", _OWL, sparsity=0.7),
    **{
        f"dlp@{round(100 * sparsity)}": Recipe(
            "wanda", "dlp", "Chen et al. 2025", {"alpha": alpha, "statistic": "mean"}, sparsity=sparsity
        )
        for sparsity, alpha in ((0.5, 0.04), (0.6, 0.1), (0.7, 0.15))
    },
    **_of_models(),
}


def recipe(name: str) -> Recipe:
    """The recipe `name`; raises BillhookError with the nearest name for an unknown one."""
    if name not in RECIPES:
        raise BillhookError(f"Unknown recipe {name!r}.{hint(name, RECIPES)} See: billhook ls recipes.")
    return RECIPES[name]


def chosen(
    name: str, criterion: str, allocator: str, refine: str, *, structured: bool = False, planned: bool = False
) -> Recipe:
    """The recipe `name` (empty: the default), with the given parts that are not empty instead of its own.

    `structured` says that the pattern is N:M, `planned` that a plan gives the sparsities. Raises BillhookError for an
    unknown name, and for a recipe that these contradict.
    """
    found = recipe(name or DEFAULT)
    own = found.allocator
    fixed = found.sparsity is not None or own not in ("uniform", AUTO)  # an allocation is what the recipe is about
    if planned and fixed:
        raise BillhookError(f"A plan already gives the sparsity of each layer: leave out the plan, or recipe {name}.")
    if structured and fixed and not allocator:
        raise BillhookError(
            f"The recipe {name} gives layers different sparsities, and an N:M pattern all the same: use --recipe "
            f"{found.criterion}, or --allocator {own} for a different N in each layer."
        )
    if planned or structured or (criterion and not name):
        own = "uniform"
    return Recipe(
        criterion or found.criterion,
        allocator or own,
        found.source,
        {} if allocator not in ("", found.allocator) else found.options,
        refine or found.refine,
        found.sparsity,
        found.group,
        found.prefix,
    )


def better(criterion: str, plan: Plan, refine: str) -> str | None:
    """The next of our recipes that loses less than a run with these; None after the best.

    A plan that was raced, or given, counts as one that is chosen as well.
    """
    raced = "racing" in plan.made_by or plan.made_by.get("allocator") is None or plan.pattern.structured
    if criterion != RECIPES[DEFAULT].criterion or not raced:
        return DEFAULT
    return "best" if refine == "none" else None
