"""Which way a layer multiplies: measured once, kept per machine, harmless when the cache is damaged."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from billhook.runtime import autotune, cache, library, products
from billhook.runtime.dense import DenseLinear
from billhook.runtime.linear import SparseLinear
from billhook.runtime.tuning import choices, tune_


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    autotune.forget()
    yield tmp_path / "cache"
    autotune.forget()


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    W = torch.randn(128, 256).bfloat16()
    W[torch.rand(W.shape) < 0.7] = 0
    return torch.nn.Sequential(SparseLinear.from_dense(W), torch.nn.ReLU(), torch.nn.Linear(128, 40).bfloat16())


class Clock:
    """A clock that only moves when told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def lasting(clock: Clock, *seconds: float) -> Callable[[], torch.Tensor]:
    """Something that takes so long, call by call; the last time again and again."""
    left = list(seconds)

    def run() -> torch.Tensor:
        clock.now += left.pop(0) if len(left) > 1 else left[0]
        return torch.empty(0)

    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(autotune, "time", made)
    return made


def test_the_least_time_that_was_repeated_decides(clock: Clock, folder: Path):
    autotune._choose(
        "calm", {"slow": lasting(clock, 9, 2, 2, 2), "fast": lasting(clock, 9, 5, 1, 1)}
    )  # the first call warms up
    autotune._choose(
        "late", {"slow": lasting(clock, 2), "fast": lasting(clock, 9, 2.4, 2.8, 3.2, 1, 1)}
    )  # rounds go on
    autotune._choose(
        "far", {"wild": lasting(clock, 9, 7, 8, 9, 5, 6), "fast": lasting(clock, 1)}
    )  # never near the fastest
    falling = [1.2**n for n in range(20, 0, -1)]
    autotune._choose(
        "busy", {"slow": lasting(clock, *(2 * seconds for seconds in falling)), "fast": lasting(clock, *falling)}
    )
    autotune.keep()
    assert autotune._measured == {"calm": "fast", "late": "fast", "far": "fast", "busy": "fast"}
    assert cache.load("kernels") == {"calm": "fast", "late": "fast", "far": "fast"}


def test_what_is_far_behind_is_given_up_and_what_is_close_returned(clock: Clock):
    calls: list[str] = []
    runs = {
        name: lasting(clock, seconds) for name, seconds in {"fast": 1.0, "close": 1.1, "slow": 2.0, "far": 3.0}.items()
    }
    counted = {name: lambda name=name, run=run: (calls.append(name), run())[1] for name, run in runs.items()}
    assert autotune._choose("ways", counted) == ["fast", "close"]
    assert calls.count("far") == 3  # a warm-up and two rounds
    assert calls.count("slow") == autotune.LEAST_ROUNDS + 1


def test_ways_that_are_close_are_timed_on_more_rows(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    def timed(few: float, more: float, seen: list[int]) -> Callable[..., torch.Tensor]:
        def run(weight: autotune.Weight, x: torch.Tensor, bias: None) -> torch.Tensor:
            seen.append(weight.shape[0])
            clock.now += few if weight.shape[0] < 100 else more
            return x

        return run

    rows: dict[str, list[int]] = {"fused": [], "tiles": [], "wide": []}
    seconds = {"fused": (2, 1), "tiles": (1.1, 1), "wide": (1, 1.2)}
    monkeypatch.setattr(autotune, "WAYS", {way: timed(*seconds[way], rows[way]) for way in rows})
    monkeypatch.setattr(autotune, "ways", lambda weight, dtype: list(rows))
    monkeypatch.setattr(autotune, "SAMPLE", 40 * 256)
    packed = model()[0].packed()
    autotune.measure_packed(packed, torch.bfloat16)
    assert {autotune._measured[autotune.key(packed, torch.bfloat16, tokens)] for tokens in autotune.BUCKETS} == {
        "tiles"
    }
    assert {way: set(seen) for way, seen in rows.items()} == {"fused": {40}, "tiles": {40, 128}, "wide": {40, 128}}


def test_scales_of_groups_have_choices_of_their_own():
    packed = model()[0]
    packed.values = packed.values.to(torch.int8)
    names = set()
    for scales in (torch.ones(128), torch.ones(128, 2), torch.ones(128, 4)):
        packed.scales = scales
        names.add(autotune.key(packed.packed(), torch.bfloat16, 16))
    assert len(names) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_are_for_the_dtype_that_the_model_computes_in(dtype: torch.dtype, clock: Clock):
    tuned = model().to(dtype)
    for name, values in {"int8": torch.int8, "bfloat16": torch.bfloat16}.items():
        packed = tuned[0]
        packed.values = packed.values.to(values)
        packed.scales = torch.ones(128) if name == "int8" else None
        tune_(tuned)
        assert {key for key in autotune._measured if f"128x256 {name} 0.7 {str(dtype)[6:]} " in key} == {
            autotune.key(packed.packed(), dtype, tokens) for tokens in autotune.BUCKETS
        }
        autotune.forget()


def test_choices_are_measured_reported_and_kept(folder: Path, clock: Clock):
    tuned = model()
    found = tune_(tuned)
    assert [choice["layer"] for choice in found][:1] == ["0"]
    assert found[0]["shape"] == [128, 256]
    assert found[0]["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert found[0]["ways"].keys() == set(autotune.BUCKETS)
    assert set(found[0]["ways"].values()) <= set(products.ways(tuned[0].packed(), torch.bfloat16))
    (file,) = folder.iterdir()
    stored = json.loads(file.read_text(encoding="utf-8"))["choices"]
    assert len(stored) == len(autotune.BUCKETS)
    assert choices(model())[0]["ways"] == found[0]["ways"]


def test_a_stored_choice_is_followed(folder: Path):
    tuned = model()
    name = autotune.key(tuned[0].packed(), torch.bfloat16, 3)
    cache.store("kernels", {name: "wide"})
    found = tune_(tuned)
    assert found[0]["ways"][4] == "wide"
    assert autotune.way(tuned[0].packed(), torch.bfloat16, 3) == "wide"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2, "choices": {}}', '{"version": 1, "choices": {"a": 1}}', "\x00\xff"]
)
def test_a_damaged_cache_is_ignored_with_one_line(text: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    path = cache.place("kernels")
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert cache.load("kernels") == {}
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(path) in line
    cache.store("kernels", {"a": "tiles"})
    assert cache.load("kernels") == {"a": "tiles"}


def test_an_unknown_way_in_the_cache_is_not_followed(folder: Path):
    tuned = model()
    cache.store(
        "kernels", {autotune.key(tuned[0].packed(), torch.bfloat16, tokens): "magic" for tokens in autotune.BUCKETS}
    )
    tune_(tuned)
    x = torch.randn(2, 256).bfloat16()
    assert torch.isfinite(tuned(x)).all()
    assert "magic" not in choices(tuned)[0]["ways"].values()


def test_the_cache_can_be_switched_off_or_unwritable(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BILLHOOK_CACHE", "0")
    tune_(model())
    assert not folder.exists()
    blocked = folder.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("BILLHOOK_CACHE", str(blocked / "below"))
    autotune.forget()
    assert tune_(model())


def test_the_cache_belongs_to_threads_and_instructions(folder: Path):
    before = cache.place("kernels")
    with library.forced("torch"):
        assert library.active() is None
        assert cache.place("kernels") != before or library.paths() == ["torch"]
    torch.set_num_threads(2)
    try:
        assert cache.place("kernels") != before
    finally:
        torch.set_num_threads(1)


def test_a_large_dense_layer_is_adopted_only_where_ours_is_faster(folder: Path):
    if library.active() is None:
        pytest.skip("needs compiled kernels")
    large = torch.nn.Sequential(torch.nn.Linear(1024, 1024).bfloat16(), torch.nn.Linear(1024, 1024))
    found = tune_(large)
    name = autotune.key(DenseWeight(large[0]), torch.bfloat16, 1)
    assert isinstance(large[0], DenseLinear) == (autotune._measured[name] == "ours")
    assert type(large[1]) is torch.nn.Linear  # float32
    assert len(found) == isinstance(large[0], DenseLinear)


def DenseWeight(layer: torch.nn.Linear) -> autotune.Weight:
    return autotune.Weight(*layer.weight.shape, layer.weight.detach())
