"""Training in two processes gives the weights of one, and a stopped run of two goes on to the same bytes."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from command import contents
from processes import done, together, weights

from billhook import prune, verify
from billhook.recovery import training

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
FEW = ("--calibration", "text.txt", "--length", "32", "--batch-size", "4", "--tokens", "1024", "--rate", "0.01")


@pytest.fixture(scope="module")
def pruned(place: Path) -> Path:
    prune(place / "model", output=place / "pruned", sparsity=0.5, criterion="magnitude", allocator="uniform")
    return place


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    tiny.save(folder / "model", tiny.llama(tie_word_embeddings=True, num_hidden_layers=3))
    tiny.text_file(folder / "text.txt", 200)
    prune(folder / "model", output=folder / "pruned", sparsity=0.5, criterion="magnitude", allocator="uniform")
    return folder


@pytest.mark.parametrize("options", [(), ("--tune", "adapters"), ("--objective", "mixed")], ids=str)
def test_the_result_is_that_of_one_process(pruned: Path, options: tuple[str, ...]) -> None:
    """Experts that one process does not use have the gradients of the other."""
    name = "-".join(options).strip("-") or "kept"
    for processes in (1, 2):
        ran = done(pruned, processes, "recover", "pruned", *FEW, *options, "--output", f"{name}{processes}")
        assert "all in their place" in ran.said[0]
        assert not any(ran.said[1:])
        assert verify(pruned / f"{name}{processes}").ok
    before, one, two = (weights(pruned / folder) for folder in ("pruned", f"{name}1", f"{name}2"))
    changes = {key: (one[key] - before[key]).abs().max() for key in one}
    assert sum(bool(change > 0) for change in changes.values()) >= 8
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=0.02 * float(changes[key]) + 1e-7), key


@pytest.mark.parametrize("sharding", [(), ("--fsdp",)], ids=["whole", "sharded"])
def test_a_stopped_run_of_two_processes_goes_on_to_the_same_bytes(pruned: Path, sharding: tuple[str, ...]) -> None:
    def stop_early() -> None:
        training.MEASURED = (2, 2)

    def kill() -> None:
        stop_early()
        before = training.MaskedAdam.step

        def step(self: training.MaskedAdam, share: float) -> None:
            before(self, share)
            calls.append(share)
            if len(calls) == 5 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), 9)

        calls: list[float] = []
        training.MaskedAdam.step = step

    run = ("recover", "pruned", *FEW, *sharding)
    whole, stopped = (f"{name}{''.join(sharding)}" for name in ("whole", "stopped"))
    assert together(pruned, 2, *run, "--output", whole, before=stop_early).codes == [0, 0]
    ran = together(pruned, 2, *run, "--output", stopped, before=kill, others=60)
    assert ran.codes[1] == -9
    assert "The run is at step 4 of 8" in ran.said[0]
    again = together(pruned, 2, *run, "--output", stopped, "--resume", before=stop_early)
    assert again.codes == [0, 0], again.said
    assert contents(pruned / stopped) == contents(pruned / whole)


def test_a_step_that_cannot_be_shared_is_refused(pruned: Path) -> None:
    ran = together(pruned, 2, "recover", "pruned", *FEW[:4], "--batch-size", "1", "--output", "no")
    assert ran.codes == [2, 2]
    assert "2 processes cannot share a step of 1 windows" in ran.said[0]
    assert not (pruned / "no").exists()


@pytest.mark.parametrize("options", [(), ("--objective", "mixed"), ("--checkpointing", "--tune", "kept")], ids=str)
def test_sharded_training_gives_the_weights_of_whole_training(tied: Path, options: tuple[str, ...]) -> None:
    """FSDP2 with parts of blocks that two processes cannot share equally, and embeddings tied to the head."""
    name = "-".join(options).strip("-") or "kept"
    for sharding in ((), ("--fsdp",)):
        folder = f"{name}{''.join(sharding)}"
        ran = done(tied, 2, "recover", "pruned", *FEW, *options, *sharding, "--output", folder)
        assert "all in their place" in ran.said[0]
        assert verify(tied / folder).ok
    before, whole, sharded = (weights(tied / folder) for folder in ("pruned", name, f"{name}--fsdp"))
    changes = {key: (whole[key] - before[key]).abs().max() for key in whole}
    assert sum(bool(change > 0) for change in changes.values()) >= 8
    for key, value in whole.items():
        assert torch.allclose(value, sharded[key], atol=0.02 * float(changes[key]) + 1e-7), key


@pytest.mark.parametrize(
    "processes, options, message",
    [
        (1, (), "over the processes of torchrun, and there is one"),
        (2, ("--tune", "adapters"), "Adapters are not sharded"),
        (2, ("--batch-size", "3"), "no multiple of 2 processes"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    pruned: Path, processes: int, options: tuple[str, ...], message: str
) -> None:
    ran = together(pruned, processes, "recover", "pruned", *FEW, *options, "--fsdp", "--output", "no")
    assert ran.codes == [2] * processes
    assert message in ran.said[0]
    assert not (pruned / "no").exists()
