"""What a run that ended early says."""

import os
import resource
import signal

import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from billhook.errors import BillhookError, Interrupted, JobError
from billhook.steps.quantize import quantize
from billhook.steps.recover_source import Source
from billhook.steps.unfinished_folder import ended_early

pytestmark = pytest.mark.gate


@pytest.fixture
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_quantized_model_that_cannot_be_expanded_is_a_failure_of_the_disk(tmp_path, request):
    model = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=1), words=False)
    small = quantize(model, "int4/32", tmp_path / "small", quantizer="round").output
    request.getfixturevalue("small_files")
    with pytest.raises(JobError, match=r"Cannot write .*out: .*File too large") as error:  # which holds what failed
        Source.of(small, tmp_path / "out")
    assert error.tb is not None
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small"}


def test_what_was_expanded_for_a_run_that_was_killed_is_deleted_by_the_next_one(tmp_path):
    model = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=1), words=False)
    small = quantize(model, "int4/32", tmp_path / "small", quantizer="round").output
    if not (child := os.fork()):
        try:
            source = Source.of(small, tmp_path / "out")
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    left = {path.name for path in tmp_path.iterdir()} - {"model", "small"}
    assert left
    source = Source.of(small, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small"} | left
    with pytest.raises(BillhookError, match="Another run is writing"):
        Source.of(small, tmp_path / "out")
    assert source.dense.is_dir()
    source.close()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small"}


@pytest.mark.parametrize(("kept", "kind"), [("", JobError), ("Block 1 is", Interrupted)])
def test_weights_that_cannot_be_written_are_a_failure_of_the_disk(tmp_path, small_files, kept, kind):
    with pytest.raises(SafetensorError) as error:
        save_file({"weight": torch.zeros(1000)}, tmp_path / "weights.safetensors")
    ended = ended_early(error.value, 4000, tmp_path / "out", kept)
    assert isinstance(ended, kind)
    assert f"Cannot write {tmp_path / 'out'}: " in str(ended)
    assert "File too large" in str(ended)
