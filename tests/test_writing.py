"""Text that a model writes itself: drawn from its own distribution, in every family, the same twice, and what it
refuses."""

import pytest
import tiny
import torch
from command import done, listing, refused, workplace
from families import CONFIGS, build
from safetensors.torch import load_file, safe_open

from billhook import BillhookError, JobError, allocate, load_calibration, load_model, measure, prune_, write_windows
from billhook.store.checkpoint import load_tokenizer


@torch.no_grad()
def one_document(model: torch.nn.Module, start: int, length: int, seed: int = 0) -> list[int]:
    """The slow way: all tokens again for every new one."""
    random, ids = torch.Generator().manual_seed(seed), torch.tensor([[start]])
    while ids.shape[1] < length:
        likely = model(ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=random)], 1)
    return ids[0].tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_drawn_from_the_whole_distribution(family: str) -> None:
    model = build(family).eval()
    model.config.bos_token_id, model.config.eos_token_id, model.generation_config = 5, None, None
    assert write_windows(model, 1, 20).tolist() == [one_document(model, 5, 20)]


def test_documents_are_cut_into_windows_and_begin_with_the_start_token() -> None:
    model = tiny.llama().eval()
    ids = write_windows(model, 70, 12)
    assert ids.shape == (70, 12)
    assert ids.dtype == torch.int64
    model.config.eos_token_id = list(range(100))  # so that documents end
    model.generation_config = None
    whole = write_windows(model, 6, 12, seed=3).flatten().tolist()
    documents = [[256, *rest] for rest in _parts(whole, 256)]
    assert len(documents) > 6
    assert max(map(len, documents)) <= 12
    assert all(token >= 100 for document in documents for token in document[1:])
    assert documents[0] == one_document_until_end(model, documents[0])


def one_document_until_end(model: torch.nn.Module, document: list[int]) -> list[int]:
    """The same document from the first row of a batch of six, drawn the slow way."""
    random, ids = torch.Generator().manual_seed(3), torch.full((6, 1), 256)
    for _ in range(len(document) - 1):
        with torch.no_grad():
            likely = model(ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=random)], 1)
    return ids[0].tolist()


def _parts(ids: list[int], mark: int) -> list[list[int]]:
    found: list[list[int]] = []
    for token in ids:
        if token == mark:
            found.append([])
        else:
            found[-1].append(token)
    return found


def test_the_same_twice_and_not_with_another_seed() -> None:
    model = tiny.llama().train()
    one, same, other = (write_windows(model, 3, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert model.training


def test_an_end_token_begins_where_there_is_no_other() -> None:
    model = tiny.llama()
    model.generation_config = None
    model.config.bos_token_id, model.config.eos_token_id = None, [257, 9]
    assert write_windows(model, 1, 4)[0, 0] == 257
    model.config.eos_token_id = None
    with pytest.raises(BillhookError, match="neither bos_token_id nor eos_token_id"):
        write_windows(model, 1, 4)


def test_documents_that_end_early_cost_no_more_passes() -> None:
    model, passes = tiny.llama(), []
    model.config.eos_token_id, model.generation_config = list(range(200)), None
    model.register_forward_hook(lambda *_: passes.append(1))
    write_windows(model, 4, 100)
    assert len(passes) < 600  # and not 99 for every four documents
    model.config.eos_token_id = list(range(258))
    with pytest.raises(JobError, match="before it begins"):
        write_windows(model, 4, 100)


def test_what_was_written_can_be_differentiated_through() -> None:
    model = tiny.llama()
    prune_(model, allocate(measure(model, []), 0.5), criterion="gblm", batches=write_windows(model, 4, 16))


def test_what_is_refused() -> None:
    model = tiny.llama()
    with pytest.raises(BillhookError, match="context of 128"):
        write_windows(model, 1, 129)
    with pytest.raises(BillhookError, match="windows=0"):
        write_windows(model, 0, 8)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(JobError, match="not finite"):
        write_windows(model, 1, 8)


def test_a_file_of_both_texts_is_read_by_prune(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(workplace(tmp_path))
    text = ("--calibration", "text.txt", "--samples", 3, "--length", 16)
    ran = done("write", "model", *text, "--windows", 5, "-o", "both.safetensors", "--json")
    assert ran.json.items() >= {"samples": 3, "windows": 5, "length": 16, "source": "text.txt"}.items()
    assert "3 windows of text.txt and 5 windows of 16 tokens that the model wrote" in ran.err
    tokens = load_file("both.safetensors")["tokens"].long()
    read = load_calibration("text.txt", load_tokenizer(tmp_path / "model"), samples=3, length=16)
    assert torch.equal(tokens, torch.cat([read.ids, write_windows(load_model(tmp_path / "model"), 5, 16)]))
    assert ran.json["digest"] == load_calibration("both.safetensors", None, length=16).digest
    with safe_open("both.safetensors", "pt") as file:
        assert '"windows": 5' in file.metadata()["about"]
    again = (tmp_path / "both.safetensors").read_bytes()
    done("write", "model", *text, "--windows", 5, "-o", "both.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == again
    pruned = done(
        "prune",
        "model",
        "--criterion",
        "admm",
        "--sparsity",
        0.5,
        "--calibration",
        "both.safetensors",
        "--output",
        "out",
        "--json",
    )
    assert pruned.code == 0
    many = done("write", "model", "--windows", 130, "--length", 4, "-o", "own.safetensors")
    assert "--samples 130" in many.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("model", "-o", "own.txt"), "must end in .safetensors"),
        (("model", "--length", "999", "-o", "own.safetensors"), "context of"),
        (("model", "-o", "nowhere/own.safetensors"), "does not exist"),
        (("nowhere", "-o", "own.safetensors"), "no model directory"),
        (("model", "--calibration", "none.txt", "-o", "own.safetensors"), "no file none.txt"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, arguments, match) -> None:
    place = workplace(tmp_path)
    monkeypatch.chdir(place)
    before = listing(place)
    refused(place, "write", *arguments, match=match)
    assert listing(place) == before
