"""Values from json are checked against types: what fits is returned, what does not is named by its place."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from billhook.errors import BillhookError
from billhook.store.typed_json import typed


@dataclass(frozen=True)
class Inner:
    name: str
    pair: tuple[int, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: list[Inner]
    numbers: dict[str, float]
    kind: Literal["a", "b"] = "a"
    maybe: float | None = None
    rest: dict[str, Any] = field(default_factory=dict)


WHOLE = {"inner": [{"name": "x", "pair": [1, 2], "notes": ["y"]}], "numbers": {"one": 1, "half": 0.5}}


def test_a_dataclass_is_made_of_what_fits_and_unknown_fields_are_ignored():
    made = typed(Outer, WHOLE | {"maybe": 2, "later": []}, "file")
    assert made == Outer([Inner("x", (1, 2), ("y",))], {"one": 1, "half": 0.5}, maybe=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": [{"name": "x"}]}, r"file, inner, number 0: 'pair' is missing\."),
        ({"inner": {}}, r"file, inner: must be a list, found \{\}\."),
        ({"inner": [3]}, r"file, inner, number 0: must be an object, found 3\."),
        ({"inner": [{"name": 3, "pair": [1, 2]}]}, r"file, inner, number 0, name: must be a string, found 3\."),
        ({"inner": [{"name": "x", "pair": [1]}]}, r"pair: must be a list of 2, found \[1\]\."),
        ({"inner": [{"name": "x", "pair": [1, True]}]}, r"pair, number 1: must be a whole number, found True\."),
        ({"inner": [{"name": "x", "pair": [1, 2.0]}]}, r"pair, number 1: must be a whole number, found 2\.0\."),
        (
            {"inner": [{"name": "x", "pair": [1, 2], "notes": [None]}]},
            r"notes, number 0: must be a string, found None\.",
        ),
        ({"numbers": {"one": "1"}}, r"file, numbers, one: must be a number, found '1'\."),
        ({"numbers": {"one": False}}, r"file, numbers, one: must be a number, found False\."),
        ({"kind": "c"}, r"file, kind: must be one of 'a', 'b', found 'c'\."),
        ({"maybe": "x"}, r"file, maybe: must be a number, found 'x'\."),
    ],
)
def test_the_first_value_that_does_not_fit_is_named(change, message):
    with pytest.raises(BillhookError, match=message):
        typed(Outer, WHOLE | change, "file")


def test_of_a_dict_of_kinds_only_these_fields_are_checked():
    value = {"a": 1, "more": object()}
    assert typed({"a": int, "b": str | None}, value, "file") is value
    with pytest.raises(BillhookError, match=r"file, c: must be a string, found None\."):
        typed({"c": str}, value, "file")
