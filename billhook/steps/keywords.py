"""The keyword arguments of the public functions that are options of methods or fields of a request, for type checkers.

Options of methods in packages of their own are given as `options={...}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from billhook.engine.method import Group
from billhook.text.given import Given


class MethodOptions(TypedDict, total=False):
    """The options of all built-in allocators and criteria; `auto` is chosen on held-out text."""

    alpha: float | str
    beta: float | str | None
    block_size: int
    cycles: int
    damping: float
    dense_target: float
    epsilon: float | str
    file: str | None
    floor: float | str
    lam: float | str
    m: float
    mapping: str
    metric: str
    mode: str
    norm: str
    power: float
    rho: float | None
    scale: float
    score: str
    statistic: str
    steps: int | None
    strength: float
    threshold: float
    trial: float


class DrawnFields(TypedDict, total=False):
    """Fields of a request that `search` and `compare` read: the text, the layers and where to compute."""

    group: Group | None
    calibration: Given | None
    bos: str
    skip_unreadable: bool
    samples: int
    length: int | None
    batch_size: int | None
    seed: int
    targets: str | Sequence[str]
    ignore: str | Sequence[str]
    stacks: str | Sequence[str]
    device: str
    dtype: str
    trust_remote_code: bool


class SearchFields(DrawnFields, total=False):
    """Fields of a request that `search` reads."""

    pattern: str
    recipe: str
    criterion: str
    options: Mapping[str, Any]


class CompareFields(DrawnFields, total=False):
    """Fields of a request that `compare` reads."""

    published: bool
