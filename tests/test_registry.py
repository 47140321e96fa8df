"""Registries: names without imports, options from signatures, and messages that help."""

import math
from typing import Literal

import pytest

from billhook.errors import BillhookError
from billhook.measurement import METRICS
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.metrics import CURVES, FACTS, fact
from billhook.registry import Option, Registry, hint, method


@method(paper="a paper", needs=lambda depth, **_: (f"column:{depth}",), group="row")
def example(
    table: object,
    *,
    rate: float = 0.5,
    depth: int = 3,
    fast: bool = True,
    kind: Literal["a", "b"] = "a",
    beta: float | None = None,
) -> None:
    """An example."""


EXAMPLES = Registry("example", {"example": f"{__name__}:example", "sample": "no.such.module:nothing"})


def test_names_are_listed_without_importing_them():
    assert EXAMPLES.names() == ["example", "sample"]
    assert EXAMPLES.get("example").__doc__ == "An example."


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(
        BillhookError, match=r"Unknown example 'exampel'\. Did you mean 'example'\? There are: example, sample\."
    ):
        EXAMPLES.get("exampel")
    with pytest.raises(BillhookError, match=r"Unknown example 'zzz'\. There are"):
        EXAMPLES.get("zzz")
    assert hint("zzz", ["example"]) == ""


def test_options_are_the_keyword_only_parameters():
    assert {name: option.default for name, option in EXAMPLES.options("example").items()} == {
        "rate": 0.5,
        "depth": 3,
        "fast": True,
        "kind": "a",
        "beta": None,
    }
    assert EXAMPLES.paper("example") == "a paper"
    assert EXAMPLES.group("example") == "row"
    assert EXAMPLES.needs("example", EXAMPLES.configure("example", {"depth": "7"})) == ("column:7",)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"rate": "0.25"}, 0.25),
        ({"rate": 1}, 1.0),
        ({"rate": "1e-2"}, 0.01),
        ({"depth": "4"}, 4),
        ({"depth": "4.0"}, 4),
        ({"fast": "false"}, False),
        ({"fast": "1"}, True),
        ({"fast": "True"}, True),
        ({"kind": "b"}, "b"),
        ({"beta": "0.1"}, 0.1),
        ({"beta": "none"}, None),
        ({"beta": None}, None),
    ],
    ids=str,
)
def test_values_are_read_as_the_type_of_the_option(given, expected):
    (key,) = given
    value = EXAMPLES.configure("example", given)[key]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rate": "fast"}, r"example 'example': rate='fast' is not a valid float \(default 0\.5\)"),
        ({"rate": math.nan}, "rate must be a number, got NaN"),
        ({"rate": "nan"}, "rate must be a number, got NaN"),
        ({"rate": None}, "rate=None is not a valid float"),
        ({"rate": [1]}, "rate="),
        ({"depth": "4.5"}, "depth='4.5' is not a valid int"),
        ({"depth": "inf"}, "depth='inf' is not a valid int"),
        ({"depth": "nan"}, "depth='nan' is not a valid int"),
        ({"fast": "yes"}, "fast='yes' is not a valid bool"),
        ({"kind": "c"}, r"kind='c' is not one of a, b"),
        ({"beta": "much"}, "beta='much' is not a valid float"),
        ({"rat": 1}, r"has no option 'rat'\. Did you mean 'rate'\? Its options: rate=0\.5, depth=3"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(given, message):
    with pytest.raises(BillhookError, match=message):
        EXAMPLES.configure("example", given)


@pytest.mark.parametrize("registry", [ALLOCATORS, CRITERIA], ids=lambda r: r.kind)
def test_every_method_is_complete(registry: Registry):
    for name in registry.names():
        assert registry.paper(name)
        assert registry.get(name).__doc__
        for option in registry.options(name).values():
            assert option.default is not Option.__init__, option
            if option.default is not None:
                assert option.parse(str(option.default), name) == option.default
    for name in CRITERIA.names():
        assert CRITERIA.group(name) in ("row", "layer")


def test_every_metric_has_its_facts():
    assert METRICS.names() == [*FACTS, *CURVES]
    for name in METRICS.names():
        assert fact(name).sign in (1, -1)
        assert fact(f"{name}:parameter") is fact(name)
        assert callable(METRICS.get(name))
    with pytest.raises(
        BillhookError, match=r"Unknown metric 'alfa_peak'\. Did you mean 'alpha_peak'\? There are: alpha_peak"
    ):
        fact("alfa_peak")
