"""Plans come back as they were written, those of version 1 too; checks and whole numbers of zeros; every malformed plan
is one clear error."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import DATA
from tables import ANYTHING, short

import billhook
from billhook.errors import BillhookError
from billhook.plan.plan import Budget, Plan, load_plan
from billhook.plan.spec import Pattern, Spec

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
VERSION_1 = DATA / "version_1"
SHAPES = {"a": (4, 8), "b": (6, 8)}
FILE = {
    "version": 2,
    "budget": {"sparsity": 0.5},
    "weights": {"a": 0.5, "b": 0.5},
    "made_by": {"allocator": "uniform"},
}
FILE_1 = {
    "version": 1,
    "target": 0.5,
    "pattern": "unstructured",
    "sparsity": {"a": 0.5, "b": 0.5},
    "made_by": {"allocator": "uniform"},
}
NAMES = st.text(st.characters(exclude_categories=["Cs"]))
SPECS = st.one_of(st.floats(0, 1), st.sampled_from(["2:4", "1:1024", "q4_k", "int4/64"])).map(Spec.parse)


def plan(pattern: str = "unstructured", target: float = 0.5, **sparsity: float) -> Plan:
    return Plan.of_sparsities(target, Pattern.parse(pattern), sparsity or {"a": 0.5, "b": 0.5})


@relaxed
@given(
    budget=st.one_of(
        st.floats(0, 1, exclude_max=True).map(lambda s: Budget("sparsity", s)),
        st.integers(1, 10**15).map(lambda n: Budget("bytes", n)),
        st.integers(1, 10**15).map(lambda n: Budget("parameters", n)),
    ),
    weights=st.dictionaries(NAMES, SPECS, min_size=1),
    units=st.dictionaries(NAMES, st.integers(0, 10**6)),
)
def test_a_plan_is_read_as_it_was_written(budget, weights, units, tmp_path):
    made = Plan(budget, weights, units, {"allocator": "x", "options": {"beta": None}})
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_a_plan_file_is_readable(tmp_path):
    Plan(Budget("bytes", 10), {"a": Spec(0.5), "b": Spec.parse("2:4"), "c": Spec(type="q4_k")}).save(tmp_path / "p")
    text = (tmp_path / "p").read_text()
    assert '\n  "a": 0.5,\n  "b": "2:4",\n  "c": "q4_k"\n' in text
    assert "units" not in text
    assert text.endswith("}\n")


def test_plans_of_version_1_are_read():
    """As the program that wrote version 1 wrote them."""
    old = json.loads((VERSION_1 / "plan.json").read_text())
    made = load_plan(VERSION_1 / "plan.json")
    assert (made.budget, made.target, made.pattern) == (Budget("sparsity", 0.6), 0.6, Pattern())
    assert made.sparsity == old["sparsity"]
    assert made.made_by == old["made_by"]
    old = json.loads((VERSION_1 / "plan_2_4.json").read_text())
    made = load_plan(VERSION_1 / "plan_2_4.json")
    assert (made.target, made.pattern) == (0.5, Pattern(2, 4))
    assert made.sparsity == old["sparsity"]
    assert [spec.to_json() for spec in made.weights.values()] == ["3:4"] * 3 + ["1:4"] * 3
    assert Plan.from_json(made.to_json(), "again") == made


def test_the_pattern_is_that_of_the_average_layer():
    assert plan("2:4", a=0.25, b=0.75).pattern == plan("2:4", a=0, b=0.5).pattern == Pattern(2, 4)
    assert plan("2:4", a=0, b=1).pattern == Pattern()
    mixed = Plan(Budget("sparsity", 0.5), {"a": Spec.parse("2:4"), "b": Spec(0.5)})
    assert mixed.pattern == Pattern()
    assert mixed.zeros(SHAPES) == {"a": 16, "b": 24}


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
        plan(a=0.5, b=bad)


def test_groups_that_do_not_fit_are_named():
    plan("2:4").check(SHAPES)
    plan("2:4", a=0.25, b=0.75).check(SHAPES)
    plan("2:4", a=0, b=1).check(SHAPES)
    with pytest.raises(
        BillhookError,
        match=r"2:4 is impossible for b: its 9 columns do not divide by 4\. Leave out .* \(ignore=\['b'\]\)",
    ):
        plan("2:4").check(SHAPES | {"b": (6, 9)})
    with pytest.raises(BillhookError, match=r"b: sparsity 0\.6 is not a multiple of 1/4, which pattern 2:4 needs"):
        plan("2:4", a=0.5, b=0.6)


def test_types_that_do_not_fit_are_named():
    typed = Plan(Budget("bytes", 10**6), {"a": Spec(type="q4_k"), "b": Spec(type="q8_0")})
    assert typed.bytes({"a": (4, 512), "b": (6, 32)}) == 4 * 2 * 144 + 6 * 34
    with pytest.raises(BillhookError, match=r"Type q4_k is impossible for a: its 576 columns do not divide by 256"):
        typed.check({"a": (4, 576), "b": (6, 32)})
    with pytest.raises(BillhookError, match=r"a has a sparsity and no storage type"):
        plan().bytes(SHAPES)


@pytest.mark.parametrize(
    "made, message",
    [
        (
            Plan(Budget("bytes", 1), {"a": Spec(type="q4_k"), "b": Spec(0.5)}),
            r"This plan stores layers as q4_k: billhook prune applies sparsities\.",
        ),
        (Plan(Budget("sparsity", 0.5), {"a": Spec(0.5)}, {"layers.3.mlp:channels": 2}), r"layers\.3\.mlp:channels"),
        (Plan(Budget("parameters", 9), {"a": Spec(0.5)}), "has a budget in parameters"),
    ],
)
def test_plans_that_pruning_cannot_apply_are_refused(made, message):
    with pytest.raises(BillhookError, match=message):
        made.check_sparsities()
    with pytest.raises(BillhookError, match=message):
        billhook.prune("no such model", plan=made, criterion="magnitude")
    if made.budget.kind != "sparsity":
        with pytest.raises(BillhookError, match=f"budget in {made.budget.kind}"):
            _ = made.target


@relaxed
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1)), min_size=1, max_size=20))
def test_zeros_are_whole_numbers_that_add_up_to_the_budget(layers):
    made = Plan.of_sparsities(0.5, Pattern(), {str(i): s for i, (_, _, s) in enumerate(layers)})
    shapes = {str(i): (out, columns) for i, (out, columns, _) in enumerate(layers)}
    zeros = made.zeros(shapes)
    assert abs(sum(zeros.values()) - math.fsum(out * columns * s for out, columns, s in layers)) <= 0.5 + 1e-6
    for name, (out, columns) in shapes.items():
        assert abs(zeros[name] - made.sparsity[name] * out * columns) < 1
        assert 0 <= zeros[name] <= out * columns


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, r"not a plan of version 1 or 2 \(found 3\)"),
        ({"version": [2]}, r"not a plan of version 1 or 2"),
        ({"version": True}, r"not a plan of version 1 or 2"),
        ({"budget": None}, "'budget' must be an object with one of sparsity, bytes, parameters"),
        ({"budget": {"sparsity": 0.5, "bytes": 3}}, "'budget' must be an object with one of"),
        ({"budget": {"sparsity": 1}}, r"[Ss]parsity must be a number in \[0, 1\)"),
        ({"budget": {"sparsity": math.nan}}, "budget, sparsity is nan, which is not a finite number"),
        ({"budget": {"bits": 3}}, "Unknown budget 'bits'"),
        ({"budget": {"bytes": 1.5}}, "in bytes must be a positive integer"),
        ({"budget": {"bytes": 0}}, "in bytes must be a positive integer"),
        ({"weights": {}}, "'weights' must be an object"),
        ({"weights": [0.5]}, "'weights' must be an object"),
        ({"units": [1]}, "'weights' must be an object of .* 'units' one of counts"),
        ({"units": {"layers.0:heads": -1}}, r"unit layers\.0:heads: .* whole number, got -1"),
        ({"weights": {"a": 0.5, "b": math.nan}}, "weights, b is nan, which is not a finite number"),
        ({"weights": {"a": 0.5, "b": "q4k"}}, r"b: Unknown storage type 'q4k'\. Did you mean 'q4_k'\?"),
        ({"weights": {"a": 0.5, "b": "4:2"}}, r"b: Pattern '4:2' is neither"),
    ],
    ids=str,
)
def test_malformed_plans_are_refused(change, message, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(FILE | change))
    with pytest.raises(BillhookError, match=message) as caught:
        load_plan(tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": 1}, r"[Ss]parsity must be a number in \[0, 1\)"),
        ({"target": None}, r"[Ss]parsity must be a number"),
        ({"target": math.nan}, "target is nan, which is not a finite number"),
        ({"pattern": "2:2"}, "neither 'unstructured' nor N:M"),
        ({"pattern": None}, "neither 'unstructured' nor N:M"),
        ({"pattern": "2:5"}, r"a: sparsity 0\.5 is not a multiple of 1/5"),
        ({"sparsity": {}}, "'sparsity' must be an object"),
        ({"sparsity": [0.5]}, "'sparsity' must be an object"),
        ({"sparsity": {"a": 0.5, "b": math.nan}}, "sparsity, b is nan, which is not a finite number"),
        ({"sparsity": {"a": 0.5, "b": math.inf}}, "sparsity, b is inf, which is not a finite number"),
        ({"sparsity": {"a": 0.5, "b": 1.5}}, "the sparsity of b must be a number"),
        ({"sparsity": {"a": 0.5, "b": 10**400}}, "sparsity, b is 10+, which is not a finite number"),
        ({"sparsity": {"a": 0.5, "b": "0.5"}}, "the sparsity of b must be a number"),
        ({"sparsity": {"a": 0.5, "b": True}}, "the sparsity of b must be a number"),
    ],
    ids=str,
)
def test_malformed_plans_of_version_1_are_refused(change, message, tmp_path):
    test_malformed_plans_are_refused(FILE_1 | change, message, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"version": 1, "target": 0, "pattern": "unstructured", "sparsity": {"a": 0, "b": 1}},
        {"version": 2, "budget": {"sparsity": 0}, "weights": {"a": 0, "b": 1}},
    ],
)
def test_a_plan_written_by_hand_needs_only_weights_and_budget(content, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(content))
    assert load_plan(tmp_path / "plan.json").sparsity == {"a": 0.0, "b": 1.0}


@relaxed
@given(file=st.sampled_from([FILE, FILE_1]), key=st.sampled_from([*FILE, *FILE_1, "units", "a", "b"]), value=ANYTHING)
def test_any_plan_file_is_read_or_refused(file, key, value, tmp_path):
    layers = "weights" if file is FILE else "sparsity"
    content = file | {layers: file[layers] | {key: value}} if key in ("a", "b") else file | {key: value}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    try:
        made = billhook.load_plan(tmp_path / "plan.json")
        made.check(SHAPES)
    except BillhookError as error:
        short(error)
    else:
        assert all(0 <= s <= 1 for s in made.sparsity.values())
        made.zeros(SHAPES)
