"""Plans come back as they were written; patterns, checks and whole numbers of zeros; every malformed plan is one clear
error."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_table import ANYTHING, short

import billhook
from billhook.errors import BillhookError
from billhook.plan.plan import Pattern, SparsityPlan, load_plan

relaxed = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = {"a": (4, 8), "b": (6, 8)}
FILE = {
    "version": 1,
    "target": 0.5,
    "pattern": "unstructured",
    "sparsity": {"a": 0.5, "b": 0.5},
    "made_by": {"allocator": "uniform"},
}


def plan(pattern: str = "unstructured", target: float = 0.5, **sparsity: float) -> SparsityPlan:
    return SparsityPlan(target, Pattern.parse(pattern), sparsity or {"a": 0.5, "b": 0.5})


@relaxed
@given(
    target=st.floats(0, 1, exclude_max=True),
    pattern=st.sampled_from(["unstructured", "2:4", "1:1024"]),
    sparsity=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), min_size=1),
)
def test_a_plan_comes_back_as_it_was(target, pattern, sparsity, tmp_path):
    made = SparsityPlan(target, Pattern.parse(pattern), sparsity, {"allocator": "x", "options": {"beta": None}})
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_a_plan_is_written_for_people(tmp_path):
    plan().save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '\n  "a": 0.5,\n' in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("text, keep, of", [("2:4", 2, 4), ("1:2", 1, 2), ("5:8", 5, 8), ("1023:1024", 1023, 1024)])
def test_patterns(text, keep, of):
    pattern = Pattern.parse(text)
    assert (pattern.keep, pattern.of, pattern.structured, str(pattern)) == (keep, of, True, text)
    assert not Pattern.parse("unstructured").structured
    assert Pattern.parse(str(Pattern())) == Pattern()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "2:",
        ":4",
        "4:4",
        "0:4",
        "5:4",
        "2:4:8",
        "-1:4",
        "2.0:4",
        "two:four",
        "2 : 4",
        "٢:٤",
        "1:1025",
        "9" * 5000 + ":4",
    ],
)
def test_what_is_no_pattern(text):
    with pytest.raises(BillhookError, match=r"neither 'unstructured' nor N:M") as caught:
        Pattern.parse(text)
    assert len(str(caught.value)) < 300


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(
        BillhookError,
        match=r"2 of its layers are not in the plan and 2 of the plan's are not in the model \(first: x1\)",
    ):
        plan().check({"x1": (4, 8), "x2": (4, 8)})
    with pytest.raises(BillhookError, match=r"1 of its layers are not in the plan and 0 .*first: c"):
        plan().check(SHAPES | {"c": (4, 8)})
    with pytest.raises(BillhookError, match=r"0 of its layers are not in the plan and 1 .*first: b"):
        plan().check({"a": (4, 8)})
    with pytest.raises(BillhookError, match=r"Did you mean 'layers\.0\.up_prjo'\?"):
        plan(**{"layers.0.up_prjo": 0.5}).check({"layers.0.up_proj": (4, 8)})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.01, 1.01])
def test_sparsities_out_of_range_are_named(bad):
    with pytest.raises(BillhookError, match=r"in b: it must be in \[0, 1\]"):
        plan(a=0.5, b=bad).check(SHAPES)


def test_groups_that_do_not_fit_are_named():
    plan("2:4").check(SHAPES)
    plan("2:4", a=0.25, b=0.75).check(SHAPES)
    plan("2:4", a=0, b=1).check(SHAPES)
    with pytest.raises(
        BillhookError, match=r"2:4 is impossible for b: its 9 columns do not divide by 4\. Leave it out with --ignore b"
    ):
        plan("2:4").check(SHAPES | {"b": (6, 9)})
    with pytest.raises(BillhookError, match=r"b: sparsity 0\.6 is not a multiple of 1/4, which pattern 2:4 needs"):
        plan("2:4", a=0.5, b=0.6).check(SHAPES)


@relaxed
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=20))
def test_zeros_are_whole_and_add_up(layers):
    made = SparsityPlan(0.5, Pattern(), {str(i): s for i, (_, _, s) in enumerate(layers)})
    shapes = {str(i): (out, columns) for i, (out, columns, _) in enumerate(layers)}
    zeros = made.zeros(shapes)
    assert abs(sum(zeros.values()) - math.fsum(out * columns * s for out, columns, s in layers)) <= 0.5 + 1e-6
    for name, (out, columns) in shapes.items():
        assert abs(zeros[name] - made.sparsity[name] * out * columns) < 1
        assert 0 <= zeros[name] <= out * columns


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, r"not a plan of version 1 \(found 2\)"),
        ({"target": 1}, r"[Ss]parsity must be a number in \[0, 1\)"),
        ({"target": None}, r"[Ss]parsity must be a number"),
        ({"target": math.nan}, r"[Ss]parsity must be a number"),
        ({"pattern": "2:2"}, "neither 'unstructured' nor N:M"),
        ({"pattern": None}, "neither 'unstructured' nor N:M"),
        ({"sparsity": {}}, "'sparsity' must be an object"),
        ({"sparsity": [0.5]}, "'sparsity' must be an object"),
        ({"sparsity": {"a": 0.5, "b": math.nan}}, r"the sparsity of b must be a number in \[0, 1\], got nan"),
        ({"sparsity": {"a": 0.5, "b": math.inf}}, "the sparsity of b must be a number"),
        ({"sparsity": {"a": 0.5, "b": 1.5}}, "the sparsity of b must be a number"),
        ({"sparsity": {"a": 0.5, "b": 10**400}}, "the sparsity of b must be a number"),
        ({"sparsity": {"a": 0.5, "b": "0.5"}}, "the sparsity of b must be a number"),
        ({"sparsity": {"a": 0.5, "b": True}}, "the sparsity of b must be a number"),
    ],
    ids=str,
)
def test_malformed_plans(change, message, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(FILE | change))
    with pytest.raises(BillhookError, match=message) as caught:
        load_plan(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)


def test_a_plan_edited_by_hand_needs_little(tmp_path):
    (tmp_path / "plan.json").write_text(
        json.dumps({"version": 1, "target": 0, "pattern": "unstructured", "sparsity": {"a": 0, "b": 1}})
    )
    assert load_plan(tmp_path / "plan.json").sparsity == {"a": 0.0, "b": 1.0}


@relaxed
@given(key=st.sampled_from([*FILE, "a", "b"]), value=ANYTHING)
def test_whatever_is_in_a_plan_it_is_read_or_refused(key, value, tmp_path):
    content = FILE | {key: value} if key in FILE else FILE | {"sparsity": {"a": 0.5, "b": 0.5, key: value}}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    try:
        made = billhook.load_plan(tmp_path / "plan.json")
        made.check(SHAPES)
    except BillhookError as error:
        short(error)
    else:
        assert all(0 <= s <= 1 for s in made.sparsity.values())
        made.zeros(SHAPES)
