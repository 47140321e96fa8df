"""Every option that a method does not have, or has in another type, is refused with the method and what it has."""

import re
from typing import Any

import pytest

from billhook import BillhookError
from billhook.errors import on_command_line
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.sparse import CRITERIA
from billhook.methods.structured import STRUCTURED
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.level_allocators import LEVEL_ALLOCATORS
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.recovery.objectives import OBJECTIVES
from billhook.registry import Registry
from billhook.steps.options import split_options

ALLOCATING = (ALLOCATORS, MODEL_ALLOCATORS, LEVEL_ALLOCATORS)
METHODS = (CRITERIA, QUANTIZERS, STRUCTURED)
EVERY = {key for kind in (*ALLOCATING, *METHODS, OBJECTIVES) for name in kind.names() for key in kind.options(name)}


def of(kinds: tuple[Registry, ...]) -> list[Any]:
    return [pytest.param(kind, name, id=f"{kind.kind} {name}") for kind in kinds for name in kind.names()]


@pytest.mark.parametrize(("kind", "name"), of(METHODS))
def test_options_of_other_methods_are_refused(kind: Registry, name: str):
    known = kind.options(name)
    with on_command_line():
        for key in (EVERY | {"bogus"}) - known.keys():
            with pytest.raises(
                BillhookError, match=f"{kind.kind.capitalize()} '{name}' does not have an option '{key}'"
            ) as refusal:
                split_options({key: "1"}, name, [], ["budget", "bos", "seed"], methods=kind)
            assert str(refusal.value).endswith(f"Its options: {', '.join(known) or 'none'}.")
            assert "budget" not in str(refusal.value)  # which --set cannot give


@pytest.mark.parametrize(("kind", "name"), of(ALLOCATING))
def test_options_of_other_allocators_are_refused(kind: Registry, name: str):
    known = [*sorted(kind.options(name)), *CRITERIA.options("sparsegpt")]
    for key in (EVERY | {"bogus"}) - {*known}:
        with pytest.raises(BillhookError, match=f"Neither {kind.kind} '{name}' nor criterion 'sparsegpt'") as refusal:
            split_options({key: "1"}, "sparsegpt", [name], allocating=kind)
        assert all(option in str(refusal.value).partition("Their options: ")[2] for option in known)


@pytest.mark.parametrize(("kind", "name"), of((*ALLOCATING, *METHODS, OBJECTIVES)))
def test_a_value_of_another_type_is_refused_with_the_method(kind: Registry, name: str):
    for key, option in kind.options(name).items():
        if "str" not in str(option.annotation):
            with pytest.raises(BillhookError, match=re.escape(f"{kind.kind} '{name}': {key}='x' is not")):
                kind.configure(name, {key: "x"})


def test_allocators_that_need_the_model_are_allocators_to_everyone():
    """`rco` serves prune, slim and compress."""
    assert {kind.kind for kind in (ALLOCATORS, MODEL_ALLOCATORS)} == {"allocator"}
