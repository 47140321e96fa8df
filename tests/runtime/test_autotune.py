"""Which way a layer multiplies: measured once, cached per machine, and a damaged cache is ignored."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from billhook.runtime import autotune, cache, library, products
from billhook.runtime.layout import PADDING
from billhook.runtime.linear import DenseLinear, SparseLinear
from billhook.runtime.tuning import choices, tune_


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    autotune.clear_choices()
    yield tmp_path / "cache"
    autotune.clear_choices()


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    W = torch.randn(128, 256).bfloat16()
    W[torch.rand(W.shape) < 0.7] = 0
    return torch.nn.Sequential(SparseLinear.from_dense(W), torch.nn.ReLU(), torch.nn.Linear(128, 40).bfloat16())


class Clock:
    """A clock that moves only when it is advanced."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def taking(clock: Clock, *seconds: float) -> Callable[[], torch.Tensor]:
    """A function whose calls take these `seconds`, the last of them repeatedly."""
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


def test_the_best_time_measured_twice_decides(clock: Clock, folder: Path):
    autotune._measure(
        "steady", {"slow": taking(clock, 9, 2, 2, 2), "fast": taking(clock, 9, 5, 1, 1)}
    )  # the first call warms up
    autotune._measure("late", {"slow": taking(clock, 2), "fast": taking(clock, 9, 2.4, 2.8, 3.2, 1, 1)})  # rounds go on
    autotune._measure(
        "far", {"wild": taking(clock, 9, 7, 8, 9, 5, 6), "fast": taking(clock, 1)}
    )  # never near the fastest
    falling = [1.2**n for n in range(20, 0, -1)]
    autotune._measure(
        "busy", {"slow": taking(clock, *(2 * seconds for seconds in falling)), "fast": taking(clock, *falling)}
    )
    autotune.store_choices()
    assert autotune._measured == {"steady": "fast", "late": "fast", "far": "fast", "busy": "fast"}
    assert cache.load("kernels") == {"steady": "fast", "late": "fast", "far": "fast"}


def test_slow_kernels_are_dropped_and_close_ones_kept(clock: Clock):
    calls: list[str] = []
    runs = {
        name: taking(clock, seconds) for name, seconds in {"fast": 1.0, "close": 1.1, "slow": 2.0, "far": 3.0}.items()
    }
    counted = {name: lambda name=name, run=run: (calls.append(name), run())[1] for name, run in runs.items()}
    assert autotune._measure("ways", counted) == ["fast", "close"]
    assert calls.count("far") == 3  # a warm-up and two rounds
    assert calls.count("slow") == autotune.MIN_ROUNDS + 1


def test_close_kernels_are_timed_on_more_rows(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    def timed(few: float, more: float, seen: list[int]) -> Callable[..., torch.Tensor]:
        def run(weight: autotune.Weight, x: torch.Tensor, bias: None) -> torch.Tensor:
            seen.append(weight.shape[0])
            clock.now += few if weight.shape[0] < 100 else more
            return x

        return run

    rows: dict[str, list[int]] = {"fused": [], "tiles": [], "large_tiles": []}
    seconds = {"fused": (2, 1), "tiles": (1.1, 1), "large_tiles": (1, 1.2)}
    monkeypatch.setattr(autotune, "WAYS", {way: timed(*seconds[way], rows[way]) for way in rows})
    monkeypatch.setattr(autotune, "ways", lambda weight, dtype: list(rows))
    monkeypatch.setattr(autotune, "SAMPLE", 40 * 256)
    packed = model()[0].packed()
    autotune.measure_packed(packed, torch.bfloat16)
    assert {autotune._measured[autotune.key(packed, torch.bfloat16, tokens)] for tokens in autotune.BUCKETS} == {
        "tiles"
    }
    assert {way: set(seen) for way, seen in rows.items()} == {
        "fused": {40},
        "tiles": {40, 128},
        "large_tiles": {40, 128},
    }


def stored_as(packed: SparseLinear, dtype: torch.dtype) -> torch.Tensor:
    """The values of a packed layer in another dtype, with as many bytes behind them."""
    count = packed.values.numel() - PADDING // packed.values.element_size()
    values = torch.zeros(count + PADDING // dtype.itemsize, dtype=dtype)
    values[:count] = packed.values[:count]
    return values


def test_scales_of_groups_have_choices_of_their_own():
    packed = model()[0]
    packed.values = stored_as(packed, torch.int8)
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
        packed.values = stored_as(packed, values)
        packed.scales = torch.ones(128) if name == "int8" else None
        tune_(tuned)
        assert {key for key in autotune._measured if f"128x256 {name} 0.7 {str(dtype)[6:]} " in key} == {
            autotune.key(packed.packed(), dtype, tokens) for tokens in autotune.BUCKETS
        }
        autotune.clear_choices()


def test_choices_are_measured_reported_and_stored(folder: Path, clock: Clock):
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


def test_a_cached_choice_is_used(folder: Path):
    tuned = model()
    name = autotune.key(tuned[0].packed(), torch.bfloat16, 3)
    cache.store("kernels", {name: "large_tiles"})
    found = tune_(tuned)
    assert found[0]["ways"][4] == "large_tiles"
    assert autotune.way(tuned[0].packed(), torch.bfloat16, 3) == "large_tiles"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2, "choices": {}}', '{"version": 1, "choices": {"a": 1}}', "\x00\xff"]
)
def test_a_damaged_cache_is_ignored_with_one_line(text: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    path = cache.cache_file("kernels")
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert cache.load("kernels") == {}
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert str(path) in line
    cache.store("kernels", {"a": "tiles"})
    assert cache.load("kernels") == {"a": "tiles"}


def test_an_unknown_kernel_in_the_cache_is_not_used(folder: Path):
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
    autotune.clear_choices()
    assert tune_(model())


def test_the_cache_is_for_one_number_of_threads_and_instruction_set(folder: Path):
    before = cache.cache_file("kernels")
    with library.forced("torch"):
        assert library.active() is None
        assert cache.cache_file("kernels") != before or library.paths() == ["torch"]
    torch.set_num_threads(2)
    try:
        assert cache.cache_file("kernels") != before
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("faster", ["ours", "torch"])
def test_a_large_dense_layer_is_replaced_only_where_that_is_faster(faster: str, monkeypatch: pytest.MonkeyPatch):
    if library.active() is None:
        pytest.skip("needs compiled kernels")
    large = torch.nn.Sequential(torch.nn.Linear(1024, 1024).bfloat16(), torch.nn.Linear(1024, 1024))
    monkeypatch.setattr(autotune, "_measure", lambda name, candidates: autotune._measured.update({name: faster}))
    found = tune_(large)
    assert isinstance(large[0], DenseLinear) == (faster == "ours")
    assert type(large[1]) is torch.nn.Linear  # float32
    every = dict.fromkeys(autotune.BUCKETS, "ours")
    assert [(choice["layer"], choice["ways"]) for choice in found] == [("0", every)] * (faster == "ours")
