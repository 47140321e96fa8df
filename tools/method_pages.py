"""docs/methods/: one page for every allocator, criterion and family of metrics, from the docstrings of their modules.

A module's docstring begins with "Title: summary." and holds formula, paper, differences from the published code,
measured agreement and limits. Options come from the signature and the docstring of the method's function.
"""

import importlib
import inspect
import typing
from types import ModuleType
from typing import Any, Literal

from page_parts import NOTE, prose, summary, table, title_and_text

from billhook.architectures.families import FAMILIES
from billhook.measurement import METRICS
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.sparse import CRITERIA
from billhook.methods.structured import STRUCTURED
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.level_allocators import LEVEL_ALLOCATORS
from billhook.plan.metrics import CURVES, FACTS, Metric
from billhook.plan.recipes import RECIPES
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.recovery.objectives import OBJECTIVES
from billhook.registry import Registry

OTHERS = {  # pages of modules that are not registered methods
    "auto": "billhook.racing.automatic",
    "sparsities": "billhook.racing.sparsities",
    "recipes": "billhook.plan.recipes",
    "block_tuning": "billhook.recovery.blockwise",
    "self_text": "billhook.tasks.self_text",
    "levels": "billhook.racing.levels",
}
# of pages, because other registries have the same names
PREFIXES = {LEVEL_ALLOCATORS.kind: "levels_", STRUCTURED.kind: "slim_", OBJECTIVES.kind: "objective_"}
OPTIONS = {STRUCTURED.kind: "method"}  # where the option is not called like the kind
MORE = {"spectra": ("tails", "eigen")}  # modules whose docstrings are sections of a family's page
SOURCES = {
    "spectrum": "weights",
    "weight": "weights",
    "activations": "activations",
    "loss": "loss on text",
    "trial": "a pruned model on text",
}
COLUMNS = {**FACTS, **CURVES}


def pages() -> dict[str, str]:
    """File name below docs/methods -> text."""
    links = _links()
    found = {"index.md": _index(links)}
    for registry in (ALLOCATORS, CRITERIA, QUANTIZERS, STRUCTURED, LEVEL_ALLOCATORS, MODEL_ALLOCATORS, OBJECTIVES):
        found |= {_page(registry, name): _method(registry, name, links) for name in registry.names()}
    for family in dict.fromkeys(map(_family, COLUMNS.values())):
        found[f"{family}.md"] = _metrics(family, links)
    for name, place in OTHERS.items():
        found[f"{name}.md"] = "\n\n".join(_head(importlib.import_module(place), name, links)) + "\n"
    found["recipes.md"] += "\n" + _recipes() + "\n"
    return found


def _links() -> dict[str, str]:
    """Every name that can be written in backticks -> its page."""
    names = {name: f"{name}.md" for name in (*ALLOCATORS.names(), *CRITERIA.names(), *QUANTIZERS.names(), *OTHERS)}
    return names | {name: f"{_family(metric)}.md" for name, metric in COLUMNS.items()}


def _page(registry: Registry, name: str) -> str:
    """The file name of a method's page."""
    return f"{PREFIXES.get(registry.kind, '')}{name.replace('+', '_')}.md"


def _family(metric: Metric) -> str:
    return METRICS.get(metric.name).__module__.rpartition(".")[2]


def _head(module: ModuleType, name: str, links: dict[str, str]) -> list[str]:
    """Title, note and text of a page; names mean the methods of its own registry first, and it does not link to
    itself."""
    title, text = title_and_text(module)
    for registry in (LEVEL_ALLOCATORS, STRUCTURED, OBJECTIVES):
        if (name + "_").startswith(PREFIXES[registry.kind]) or (name == "rco" and registry is LEVEL_ALLOCATORS):
            links = links | {method: _page(registry, method) for method in registry.names()}
    return [f"# {title}", NOTE, prose(text, {key: page for key, page in links.items() if page != f"{name}.md"})]


def _method(registry: Registry, name: str, links: dict[str, str]) -> str:
    function = registry.get(name)
    module = inspect.getmodule(function)
    assert module is not None
    options = registry.options(name).values()
    needs = registry.needs(name, {o.name: o.default for o in options})
    option = f"--{OPTIONS.get(registry.kind, registry.kind)} {name}"
    option = f"billhook compress --allocator {name}" if registry.kind == LEVEL_ALLOCATORS.kind else option
    facts = [f"`{option}`", f"reads {', '.join(f'`{n}`' for n in needs) or 'nothing'}"]
    if registry is CRITERIA:
        facts.append(f"compares the weights of a {registry.group(name)}")
    path = f"{module.__name__.replace('.', '/')}.py"
    facts.append(f"[{path.rpartition('/')[2]}](../../{path})")
    head, note, text = _head(module, _page(registry, name).removesuffix(".md"), links)
    parts = [head, note, " · ".join(facts), text, "## Options"]
    if options:
        rows = [[f"`{o.name}`", f"`{_default(o.default)}`", _values(o.annotation)] for o in options]
        parts.append(table(["option", "default", "values"], rows))
    else:
        parts.append("None.")
    _, _, more = (inspect.getdoc(function) or "").partition("\n\n")
    return "\n\n".join([*parts, *([prose(more)] if more else [])]) + "\n"


def _default(value: Any) -> str:
    return "none" if value is None else str(value)


def _values(kind: Any) -> str:
    """What an option accepts, in words."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    names = {float: "number", int: "whole number", str: "text", bool: "`true`, `false`", type(None): "`none`"}
    return " or ".join(names[part] for part in (typing.get_args(kind) or (kind,)))


def _metrics(family: str, links: dict[str, str]) -> str:
    """The page of the metrics that one module computes."""
    members = [metric for metric in COLUMNS.values() if _family(metric) == family]
    place = METRICS.get(members[0].name).__module__
    parts = _head(importlib.import_module(place), family, links)
    for more in MORE.get(family, ()):
        title, text = title_and_text(importlib.import_module(f"{place.rpartition('.')[0]}.{more}"))
        parts += [f"## {title}", prose(text)]
    return "\n\n".join([*parts, "## Columns", _metric_table(members)]) + "\n"


def _metric_table(metrics: list[Metric], links: dict[str, str] | None = None) -> str:
    signs = {1: "larger", -1: "smaller"}
    rows = []
    for m in metrics:
        sign = "" if m.name in CURVES else signs[m.sign]
        name = f"[`{m.name}`]({links[m.name]})" if links else f"`{m.name}`"
        rows.append([name, m.summary, sign, SOURCES[m.reads], prose(m.paper)])
    return table(["column", "what it is", "more sparsity if", "computed from", "source"], rows)


def _recipes() -> str:
    rows = []
    for name, x in RECIPES.items():
        options = ", ".join(f"`{key}={value}`" for key, value in x.options.items())
        sparsity = "" if x.sparsity is None else f"{x.sparsity:.0%}"
        tuned = "" if x.refine == "none" else f"`{x.refine}`"
        rows.append([f"`{name}`", f"`{x.criterion}`", f"`{x.allocator}`", options, tuned, sparsity, x.source])
    return table(["recipe", "criterion", "allocator", "its options", "refine", "sparsity", "source"], rows)


def _index(links: dict[str, str]) -> str:
    parts = [
        "# Methods",
        NOTE,
        "An *allocator* decides how much each layer loses, a *criterion* which of its weights. Any allocator works "
        "with any criterion and any pattern. [Concepts](../concepts.md) explains what a run does; "
        "[Add a method](../add_a_method.md) how to write one.",
        "## Allocators",
        _registry(ALLOCATORS),
        "[`auto`](auto.md) tries several allocations on the model, [`rco`](sparsities.md) follows its gradients. "
        "[`recipes`](recipes.md) name both.",
        "## Criteria",
        _registry(CRITERIA),
        "[Block tuning](block_tuning.md) can follow any criterion (`--refine`). "
        "[Text that the model writes](self_text.md) can calibrate any of them.",
        "## Quantizers",
        "A *quantizer* rounds weights to the points of a storage type ([Quantize it](../quantize.md)). "
        "[`levels`](levels.md) chooses a type for every tensor under a size.",
        _registry(QUANTIZERS),
        "## Allocators of storage types",
        "How `billhook compress` spends a size. [`auto`](levels.md) tries several on held-out text, and "
        "`like:FILE.gguf` takes the types of another file.",
        _registry(LEVEL_ALLOCATORS),
        "This one needs the model itself, and chooses sparsities (`billhook prune --allocator rco`, see "
        "[`sparsities`](sparsities.md)) and widths (`billhook slim --allocator rco`) as well:",
        _registry(MODEL_ALLOCATORS),
        "## Structured methods",
        "Which channels and heads go when whole units are removed ([Make it smaller](../slim.md)).",
        _registry(STRUCTURED),
        "## Objectives",
        "What `billhook recover` trains what is left for ([Recover it](../recover.md)). They read predictions and "
        "hidden states of the dense model (`teacher`, `hidden`), and text that the student wrote (`written`).",
        _registry(OBJECTIVES),
        "## Metrics",
        "Columns of the table that allocators read. A parameter may follow the name after a colon: "
        f"{_with_parameter()}.",
        _metric_table(list(FACTS.values()), links),
        "## Curves",
        "Lists of numbers for each layer, measured by name like metrics.",
        _metric_table(list(CURVES.values()), links),
        "## Model families",
        "By task, `model_type` in config.json; tested in every release. Others are recognized by their structure, and "
        "refused by name if that fails. ResNet and RegNet have [convolutions](../vision.md#convolutions) only, which "
        "are pruned where they are asked for.",
        table(["task", "families"], [[f"`{t}`", ", ".join(f"`{f}`" for f in found)] for t, found in FAMILIES.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _registry(registry: Registry) -> str:
    rows = []
    for name in registry.names():
        options = registry.options(name)
        listed = ", ".join(f"`{o.name}={_default(o.default)}`" for o in options.values())
        needs = ", ".join(f"`{n}`" for n in registry.needs(name, {o.name: o.default for o in options.values()}))
        compares = [registry.group(name)] if registry is CRITERIA else []
        module = inspect.getmodule(registry.get(name))
        assert module is not None
        paper = prose(registry.paper(name))
        rows.append(
            [f"[`{name}`]({_page(registry, name)})", summary(module), listed, needs or "nothing", *compares, paper]
        )
    compares = ["compares within a"] if registry is CRITERIA else []
    return table(["name", "what it does", "options and defaults", "reads", *compares, "source"], rows)


def _with_parameter() -> str:
    found = []
    for name in FACTS:
        for option in METRICS.options(name).values():
            choices = typing.get_args(option.annotation) or (option.name.upper(),)
            found += [f"{name}:{choice}" for choice in choices if choice != option.default]
    return ", ".join(f"`{name}`" for name in found)
