"""Tables come back as they were written, and no malformed file gets past the reader or out of it as anything but one
error."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import ANYTHING, short

from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.table import Row, Table

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
LINE = {"layer": "w", "block": 0, "kind": "w", "shape": [4, 8], "metrics": {"alpha_peak": 2.0}}
FILE = {
    "version": 1,
    "model": {"name": "m"},
    "made_by": {"metrics": ["alpha_peak"]},
    "rows": [LINE, LINE | {"layer": "v", "block": 1}],
}


@relaxed
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.integers(0, 99),
            st.tuples(st.integers(1, 99), st.integers(1, 99)),
            st.dictionaries(st.text("abc:", min_size=1), st.floats(-1e299, 1e299)),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda row: row[0],
    )
)
def test_a_table_is_read_as_it_was_written(rows, tmp_path):
    table = Table(
        tuple(Row(name, block, "kind", shape, metrics) for name, block, shape, metrics in rows),
        {"name": "é"},
        {"by": 1},
    )
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table


def test_a_table_lists_columns_blocks_and_shapes():
    table = Table(
        (
            Row("b", 1, "w", (2, 3), {"x": 1.0, "y": 2.0}),
            Row("a", 0, "w", (4, 5), {"x": 3.0}),
            Row("c", 1, "v", (1, 1), {"x": 0}),
        )
    )
    assert table.total == 27
    assert table.shapes == {"b": (2, 3), "a": (4, 5), "c": (1, 1)}
    assert {block: [row.layer for row in rows] for block, rows in table.blocks().items()} == {0: ["a"], 1: ["b", "c"]}
    assert list(table.blocks()) == [0, 1]
    assert table.columns() == ["x"]
    assert table.column("x") == [1.0, 3.0, 0]
    with pytest.raises(BillhookError, match=r"no column 'y' \(it has x\).*billhook measure MODEL --metrics y"):
        table.column("y")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e305, True, "2", None])
def test_numbers_that_cannot_be_calculated_with_are_named(bad):
    table = Table((Row("v", 0, "w", (8, 8), {"alpha_peak": 2.0}), Row("w", 1, "w", (8, 8), {"alpha_peak": bad})))
    with pytest.raises(BillhookError, match="w: metric alpha_peak must be a finite number"):
        allocate(table, 0.5, allocator="alphapruning")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "not a table of version 1"),
        ({"rows": []}, "not a table of version 1"),
        ({"rows": [LINE, LINE]}, "names a layer twice"),
        ({"rows": [LINE | {"shape": [0, 8]}]}, r"row 0 \(w\): block and shape must be whole positive"),
        ({"rows": [LINE | {"shape": [8]}]}, "row 0: needs layer, block, kind, shape"),
        ({"rows": [LINE | {"shape": [math.inf, 8]}]}, "rows, 0, shape, 0 is inf, which is not a finite number"),
        ({"rows": [LINE | {"shape": [1.5, 8]}]}, "row 0"),
        ({"rows": [LINE | {"block": 10**12}]}, "must be whole positive"),
        ({"rows": [LINE | {"block": -1}]}, "must be whole positive"),
        ({"rows": [LINE | {"metrics": {"alpha_peak": math.nan}}]}, "rows, 0, metrics, alpha_peak is nan, which is not"),
        ({"rows": [LINE | {"metrics": {"alpha_peak": 10**400}}]}, "rows, 0, metrics, alpha_peak is 10+, which is not"),
        ({"rows": [LINE | {"metrics": {"alpha_peak": 1e305}}]}, r"row 0 \(w\): metric alpha_peak must be a finite num"),
        ({"rows": [LINE | {"metrics": [1, 2]}]}, "metrics an object"),
        ({"rows": [7]}, "row 0: needs layer"),
        ({"model": [1]}, "'model' must be an object"),
        ({"made_by": "me"}, "'made_by' must be an object"),
    ],
    ids=str,
)
def test_malformed_tables_are_refused(change, message, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps(FILE | change))
    with pytest.raises(BillhookError, match=message):
        Table.load(tmp_path / "table.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"version": 1}', "[" * 100_000, '{"rows": ' + "9" * 5000 + "}"],
    ids=lambda t: t[:12],
)
def test_files_that_are_no_table_are_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(BillhookError, match=r"table\.json"):
        Table.load(tmp_path / "table.json")
    with pytest.raises(BillhookError, match="There is no table"):
        Table.load(tmp_path / "other.json")
    with pytest.raises(BillhookError, match="Cannot read the table"):
        Table.load(tmp_path)


@relaxed
@given(
    key=st.sampled_from(["version", "model", "made_by", "rows", *LINE]),
    value=ANYTHING,
    allocator=st.sampled_from(ALLOCATORS.names()),
)
def test_any_table_file_is_read_or_refused(key, value, allocator, tmp_path):
    content = FILE | {key: value} if key in FILE else FILE | {"rows": [LINE | {key: value}, *FILE["rows"][1:]]}
    (tmp_path / "table.json").write_text(json.dumps(content))
    try:
        table = Table.load(tmp_path / "table.json")
        plan = allocate(table, 0.5, allocator=allocator)
    except BillhookError as error:
        short(error)
    else:
        plan.save(tmp_path / "plan.json")
        assert len(plan.sparsity) == 2
