"""One block in memory at a time: the same bytes as with the model in memory as a whole, for every family and every way
to a result."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from command import contents
from families import FAMILIES, VOCABULARY, build

from billhook import find_layers, measure, prune, prune_
from billhook.engine.activation_store import ActivationStore
from billhook.engine.streaming import open_streamed
from billhook.reports.publishing import publish
from billhook.steps.lost import loss_of
from billhook.steps.measure import measure_opened, open_to_measure
from billhook.steps.prune import PruneRequest, prepare, run
from billhook.steps.prune import record as record_of
from billhook.steps.verify import verify
from billhook.store.checkpoint import quiet
from billhook.store.directory import save_pruned
from billhook.tasks.opening import load_model

IDS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


def in_memory(source: Path, output: Path, **fields) -> Path:
    """What `prune` writes, made with the whole model in memory."""
    job = prepare(PruneRequest(load_model(source, dtype=fields.pop("dtype", "auto")), **fields))
    lost = loss_of(job.opened, job.request.drawing.held_out)
    options = {"criterion": job.request.criterion, "batches": job.opened.batches, "layers": job.opened.layers}
    results = prune_(job.opened.model, job.plan, **options, **job.method.options)
    return save_pruned(job.opened.model, source, output, record=record_of(job, results, lost()), publish=publish).path


def same(streamed: Path, reference: Path) -> None:
    """All files alike, and records and reports up to what says where the model came from."""
    one, other = contents(streamed), contents(reference)
    records = [json.loads(files.pop("billhook.json")) for files in (one, other)]
    reports = [json.loads(files.pop("report.json")) for files in (one, other)]
    for files in (one, other):  # made from the reports
        del files["README.md"], files["report.html"]
    assert reports[0] | {"model": None} == reports[1] | {"model": None}
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    for record in records:
        del record["steps"][0]["model"], record["steps"][0]["plan"]["made_by"]["model"]
    assert records[0] == records[1]
    assert verify(streamed).ok


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory) -> Path:
    with quiet():
        path = tmp_path_factory.mktemp(request.param) / "model"
        build(request.param).to(torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    return path


ALSO = [
    pytest.param(name, marks=pytest.mark.nightly) for name in ("magnitude", "sparsegpt")
]  # with one family in the fast suite, below


@pytest.mark.gate
@pytest.mark.parametrize("criterion", ["wanda", *ALSO])
def test_every_family_gives_the_bytes_of_the_model_in_memory(source, criterion, tmp_path):
    fields = {"sparsity": 0.5, "criterion": criterion, "calibration": IDS, "batch_size": 2, "dtype": "bfloat16"}
    report = prune(source, output=tmp_path / "streamed", **fields)
    assert prepare(PruneRequest(source, output=tmp_path / "other", **fields)).opened.resources.streamed
    same(report.output, in_memory(source, tmp_path / "memory", **fields))


def test_every_family_has_the_same_weights_one_block_at_a_time_and_nothing_between(source):
    whole, stream = load_model(source), open_streamed(source)
    streamed, expected = stream.model, whole.state_dict()
    prefixes = [f"{prefix}." for prefix in stream.prefixes]
    outside = [name for name in expected if not name.startswith(tuple(prefixes))]
    assert all(torch.equal(streamed.state_dict()[name], expected[name]) for name in outside)
    for index, prefix in enumerate(prefixes):
        with stream.block(index):
            here = {name: value for name, value in streamed.state_dict().items() if not value.is_meta}
            assert here.keys() == {*outside, *(name for name in expected if name.startswith(prefix))}
            assert all(
                torch.equal(value, expected[name]) and value.dtype == expected[name].dtype
                for name, value in here.items()
            )
        assert all(value.is_meta for value in stream.state(index).values())
    assert streamed.config.to_dict() == whole.config.to_dict()


def test_every_family_computes_the_same_logits(source):
    with torch.no_grad():
        assert torch.equal(load_model(source)(IDS).logits, open_streamed(source).model(IDS).logits)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16, shard="60KB")


CRITERIA = [{"criterion": name} for name in ("magnitude", "sparsegpt", "gblm")]
OTHERS = [*CRITERIA, {"criterion": "wanda", "allocator": "owl"}, {"targets": "re:.*mlp"}, {"pattern": "2:4"}]


@pytest.mark.parametrize("fields", OTHERS, ids=str)
def test_streaming_gives_the_same_bytes_with_any_option(llama, fields, tmp_path):
    fields = {"sparsity": 0.5, "criterion": "wanda", "calibration": IDS, "dtype": "bfloat16", **fields}
    same(prune(llama, output=tmp_path / "streamed", **fields).output, in_memory(llama, tmp_path / "memory", **fields))


def test_masks_made_in_a_wider_type_are_the_same(llama, tmp_path):
    fields = {"sparsity": 0.5, "criterion": "wanda", "calibration": IDS, "dtype": "float32"}
    streamed = prune(llama, output=tmp_path / "streamed", **fields).output
    same_weights = {
        k: v for k, v in contents(in_memory(llama, tmp_path / "memory", **fields)).items() if k.endswith(".safetensors")
    }
    assert {k: v for k, v in contents(streamed).items() if k.endswith(".safetensors")} == same_weights


def test_streaming_measures_the_same_table(llama):
    metrics = ["alpha_peak", "stable_rank", "outlier_ratio:5", "block_loss:0.6"]
    table = measure_opened(open_to_measure(PruneRequest(llama, calibration=IDS), metrics), metrics)
    expected = measure(load_model(llama), metrics, batches=list(IDS.split(6)))
    assert table.rows == expected.rows


def test_a_layout_that_cannot_be_kept_is_pruned_in_memory(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("billhook.store.sinks.SameLayout.mismatch", lambda sink: "made up")
    report = prune(llama, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
    assert "made up" in report.warnings[-1]
    assert verify(report.output).ok


@pytest.mark.parametrize("limit", [0.0, 3 * 400 / 2**30, 1.0])
def test_hidden_states_on_disk_are_those_put_there(limit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(2, 5, 10, generator=generator).to(dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)
    ]
    states = ActivationStore(limit, tmp_path)
    for value in values:
        states.append(value)
    states[1] = values[1] = torch.randn(5, 2, 10, generator=generator).transpose(0, 1)
    assert len(states) == 3
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(states, values, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states.take(), values, strict=True))
    assert states.nbytes == 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("criterion", ["wanda", "gblm"])
def test_results_do_not_depend_on_where_hidden_states_are(llama, criterion, tmp_path):
    fields = {"sparsity": 0.5, "calibration": IDS, "batch_size": 2, "criterion": criterion}
    one, other = (
        run(prepare(PruneRequest(llama, output=tmp_path / f"{gib}", spill_gib=gib, **fields))).output
        for gib in (0.0, 8.0)
    )
    assert contents(one) == contents(other)


def test_a_file_that_is_truncated_during_the_run_is_named(llama, tmp_path):
    stream = open_streamed(llama)
    copy = tmp_path / "copy"
    copy.mkdir()
    stream.moved(1, copy)
    for name in {stream.stored[name].path.name for name in stream.names[1]}:
        (copy / name).write_bytes((llama / name).read_bytes()[:3000])
    with pytest.raises(ValueError, match="was cut off while it was being read"), stream.block(1):
        pass
    assert find_layers(stream.model)[0].weight.is_meta
