"""Names that were removed: the error says what to use instead."""

import pytest
from command import billhook as run

import billhook
from billhook.cli import REMOVED


def test_a_removed_command_names_its_replacement():
    ran = run("analyze", "model", "--plan", "plan.json")
    assert ran.code == 2
    assert f"analyze was removed. Use {REMOVED['analyze']}." in ran.err
    assert "No such command 'analyse'" in run("analyse").err


def test_a_removed_public_name_names_its_replacement():
    assert not hasattr(billhook, "analyze")
    with pytest.raises(AttributeError, match=r"was removed: use billhook\.compare"):
        _ = billhook.analyze
