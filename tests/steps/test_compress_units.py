"""One size for units and bits: what is predicted to lose least, never worse than bits alone on held-out text."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from command import contents

from billhook.errors import BillhookError, Interrupted
from billhook.steps.compress import CompressRequest
from billhook.steps.compress_units import compress, prepare_units, run_units
from billhook.steps.verify import verify

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
FIELDS = {"calibration": IDS, "sweeps": 0, "units": "experts", "types": ("q2_0", "q4_0"), "options": {}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / "model", 1)


def saved(folder: Path, blocks: int) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8, "num_hidden_layers": blocks}
    return tiny.save(folder, tiny.mixtral(**sizes), words=False)


def request(source: Path, output: Path, **changes) -> CompressRequest:
    return CompressRequest.given(model=source, output=output, **{**FIELDS, **changes})


def test_where_bits_are_few_experts_go_with_them_and_the_result_says_so(tmp_path, source):
    job = prepare_units(request(source, tmp_path / "out", bits=3.1))
    assert [c.share for c in job.candidates] == [0.0, 0.125, 0.25]
    assert job.best.share > 0
    assert job.best.predicted == min(c.predicted for c in job.candidates)
    report = run_units(job)
    assert report.measured[report.share] == min(report.measured.values()) == report.quantized.loss.kl
    assert set(report.measured) == {0.0, job.best.share}
    assert report.quantized.size <= report.budget
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert [step["step"] for step in record["steps"]] == (["slim"] if report.share else []) + ["quantize"]
    assert record["steps"][-1]["plan"]["made_by"]["units"]["share"] == report.share
    assert verify(tmp_path / "out").ok
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.nightly
def test_with_many_bits_nothing_but_bits_is_carried_out(tmp_path, source):
    report = compress(source, tmp_path / "out", bits=6, **FIELDS)
    assert report.share == 0
    assert set(report.measured) == {0.0}
    bits = compress(source, tmp_path / "bits", bits=6, **{**FIELDS, "units": ()})
    assert report.quantized.size == bits.quantized.size
    assert report.quantized.loss == bits.quantized.loss


@pytest.mark.nightly
def test_a_size_below_all_types_is_met_with_units(tmp_path, source):
    with pytest.raises(BillhookError, match="cannot be met: the least possible") as error:
        compress(source, tmp_path / "out", size=1000, **{**FIELDS, "units": ()})
    least = int(str(error.value).partition(" is ")[2].partition(" bytes")[0].replace(",", ""))
    job = prepare_units(request(source, tmp_path / "out", size=least - 1))
    assert [c.share for c in job.candidates] == [0.125, 0.25]
    assert "With 0.0% of the parameters in blocks removed: " in job.notes[0]
    with pytest.raises(BillhookError, match="cannot be met"):
        prepare_units(request(source, tmp_path / "other", size=1000))
    assert not list(tmp_path.glob("other*"))


def test_a_stopped_run_is_not_continued_with_another_allocator(tmp_path, source):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        prepare_units(request(source, tmp_path / "out", bits=3.1), stop)
    with pytest.raises(BillhookError, match="cannot be continued: its allocator was 'curves', now it is 'auto'"):
        prepare_units(request(source, tmp_path / "out", bits=3.1, allocator="auto", resume=True))


@pytest.mark.nightly
def test_a_stopped_run_goes_on_to_the_same_bytes_and_only_as_it_was_started(tmp_path):
    source, folder, place = saved(tmp_path / "model", 2), tmp_path / "whole", tmp_path / "stopped"
    folder.mkdir()
    place.mkdir()
    whole = compress(source, folder / "out", bits=2.85, **FIELDS)
    assert len(whole.measured) == 2
    for stops in (1, 2):
        left = [stops]

        def stopping(left=left) -> bool:
            left[0] -= 1
            return left[0] == 0

        with pytest.raises(Interrupted, match=r"kept in .*out\.units: continue with the same command and resume=True"):
            run_units(prepare_units(request(source, place / "out", bits=2.85, resume=stops > 1)), stopping=stopping)
    with pytest.raises(BillhookError, match="holds an unfinished run"):
        compress(source, place / "out", bits=2.85, **FIELDS)
    with pytest.raises(BillhookError, match="cannot be continued"):
        compress(source, place / "out", bits=3.0, resume=True, **FIELDS)
    report = compress(source, place / "out", bits=2.85, resume=True, **FIELDS)
    assert contents(report.quantized.output) == contents(whole.quantized.output)


def test_a_mistake_that_no_share_would_mend_is_said_before_units_are_removed(tmp_path, source):
    finished: list[str] = []
    with pytest.raises(BillhookError, match="gguf files cannot hold q4_9"):
        prepare_units(request(source, tmp_path / "out", bits=4, types=("q4_9",)), finished.append)
    assert not any("experts" in unit for unit in finished)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"allocator": "uniform"}, "losses are predicted from measured levels"),
        ({"units": "auto"}, "Name the kinds of units"),
        ({"units": "heads,head"}, "Unknown kind of units 'head'"),
        ({"calibration": None}, "needs activations"),
        ({"calibration": "self:"}, "compared on one text"),
        ({"bits": None}, "Give exactly one of size"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_written(tmp_path, source, change, match):
    with pytest.raises(BillhookError, match=match):
        compress(source, tmp_path / "out", **{"bits": 4, **FIELDS, **change})
    assert list(tmp_path.iterdir()) == []
