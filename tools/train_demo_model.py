"""Train the bundled demo model: a small Llama, from scratch, on the sources of Python's standard library.

    torchrun --nproc-per-node 2 tools/train_demo_model.py --minutes 95 --out demo --compile   # CPU, one process a core
    python tools/train_demo_model.py --minutes 60 --out demo --device cuda                    # GPU

One visible loop: AdamW, a learning rate keyed on the wall-time budget, held-out bits per byte, checkpoints. `--out`
always holds a complete Hugging Face directory (bf16), replaced atomically at each checkpoint; `<out>.run/` holds the
loss log and the float32 state that `--resume` continues from. Runs that differ in speed see different numbers of
tokens: two runs agree in kind, not in bits.

Plain AdamW and a high learning rate on purpose: the model is a test bed for pruning, so it should grow the heavy-tailed
spectra and the outlier features that ordinarily trained models have. On a CPU, two processes of one thread beat one
process of two threads: they wait for each other once a step, not once an operation, which matters when others use the
same cores.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The script runs from a checkout, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from billhook.text.stdlib import documents

SEPARATOR = "<|endoftext|>"
DEVICE_DEFAULTS = {"cpu": {"batch": 8, "lr": 3e-3}, "cuda": {"batch": 64, "lr": 4e-3}}
OPTIONS = {
    "minutes": (95.0, "training budget in wall time; the schedule follows it"),
    "checkpoint-minutes": (5.0, "time between checkpoints"),
    "warmup-steps": (150, "steps in which the rate rises"),
    "warmdown": (0.5, "last fraction of the budget, in which the rate falls to nearly zero"),
    "seed": (0, "for the weights and the order of the text"),
    "vocab-size": (4096, "entries of the tokenizer"),
    "num-hidden-layers": (12, "blocks"),
    "hidden-size": (128, "width"),
    "intermediate-size": (352, "width inside the MLP"),
    "num-attention-heads": (4, "query heads, each 32 wide"),
    "num-key-value-heads": (2, "key and value heads"),
    "max-position-embeddings": (512, "tokens in a window, and the model's position limit"),
}
SHAPE = [name.replace("-", "_") for name in list(OPTIONS)[5:]]


def parse_arguments() -> Namespace:
    """Read the command line; fill in what depends on the device."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--device", default="cpu", choices=sorted(DEVICE_DEFAULTS))
    parser.add_argument("--batch", type=int, help="windows a step (8 on cpu, 64 on cuda)")
    parser.add_argument("--lr", type=float, help="peak learning rate (3e-3 on cpu, 4e-3 on cuda)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: a minute at the start, then a fifth faster"
    )
    parser.add_argument("--resume", action="store_true", help="continue from <out>.run/state.safetensors")
    for name, (value, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} ({value})")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or DEVICE_DEFAULTS[arguments.device]["batch"]
    arguments.lr = arguments.lr or DEVICE_DEFAULTS[arguments.device]["lr"]
    arguments.run = arguments.out.with_name(arguments.out.name + ".run")
    arguments.run.mkdir(parents=True, exist_ok=True)
    return arguments


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string of bytes has an encoding, and decoding gives exactly the same text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[SEPARATOR], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=context
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of each document, the separator first."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([tokenizer.bos_token_id, *ids]) for ids in encoded]


def batches(encoded: list[torch.Tensor], batch: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield `[batch, context]` token windows for ever; their order follows from the seed alone.

    Each epoch shuffles the documents, joins them at a random offset and shuffles the windows.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        stream = torch.cat([encoded[index] for index in order])
        offset = int(torch.randint(context, (1,), generator=generator))
        count = (len(stream) - offset) // context
        windows = stream[offset : offset + count * context].view(count, context)
        rows = torch.randperm(count, generator=generator)
        yield from (windows[chosen] for chosen in rows[: count // batch * batch].split(batch))


def build_model(arguments: Namespace, end: int) -> LlamaForCausalLM:
    """A Llama with grouped queries, tied embeddings and fresh weights."""
    torch.manual_seed(arguments.seed)
    shape = {name: getattr(arguments, name) for name in SHAPE}
    config = LlamaConfig(
        **shape, bos_token_id=end, eos_token_id=end, head_dim=32, rms_norm_eps=1e-5, tie_word_embeddings=True
    )
    # Compiled plain attention is twice as fast as the fused kernel on a CPU, and slower on a GPU.
    attention = "eager" if arguments.device == "cpu" and arguments.compile else "sdpa"
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).to(arguments.device)


def build_optimizer(model: LlamaForCausalLM, lr: float) -> AdamW:
    """Decay the blocks' matrices; leave norms and the tied embedding alone."""
    decay = {p: 0.1 if p.ndim == 2 and "embed" not in name else 0.0 for name, p in model.named_parameters()}
    groups = [{"params": [p for p in decay if decay[p] == rate], "weight_decay": rate} for rate in (0.1, 0.0)]
    return AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(arguments: Namespace, step: int, elapsed: float) -> float:
    """Trapezoid: up over the first steps, flat, then linearly to nearly zero over the last `warmdown` of the budget."""
    left = 1 - elapsed / 60 / arguments.minutes
    return arguments.lr * min(1.0, step / arguments.warmup_steps, max(0.01, left / arguments.warmdown))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, windows: torch.Tensor, bytes_per_token: float) -> float:
    """Mean next-token loss over `windows [count, context]`, in bits per byte of the text."""
    model.eval()
    loss, device = 0.0, model.device
    for rows in windows.split(8):
        with torch.autocast(device.type, torch.bfloat16):
            loss += model(rows.to(device), labels=rows.to(device)).loss.item() * len(rows)
    model.train()
    return loss / len(windows) / math.log(2) / bytes_per_token


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict, out: Path) -> None:
    """Write the whole directory beside `out`, then swap it in, so that a reader never sees half a model."""
    fresh, stale = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    copy.deepcopy(model).cpu().to(torch.bfloat16).save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(fresh)
    # For transformers 4.x, which refuses the class name that 5.x writes, and may tidy spaces away in decoded text.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    path = fresh / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=2) + "\n")
    (fresh / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    if out.exists():
        out.rename(stale)
    fresh.rename(out)
    shutil.rmtree(stale, ignore_errors=True)


def save_state(path: Path, model: LlamaForCausalLM, optimizer: AdamW, progress: dict) -> None:
    """Write weights and moments in float32, atomically."""
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, {"progress": json.dumps(progress)})
    fresh.replace(path)


@torch.no_grad()
def load_state(path: Path, model: LlamaForCausalLM, optimizer: AdamW) -> dict:
    """Put back what `save_state` wrote; return the progress."""
    with safe_open(path, "pt", device=str(model.device)) as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[parameter] = {k: file.get_tensor(f"{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
        return json.loads(file.metadata()["progress"])


def join_processes() -> tuple[int, int]:
    """Meet the other processes that torchrun started, if any; return this one's rank and their number."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    return int(os.environ.get("RANK", "0")), world


def share_gradients(model: LlamaForCausalLM, elapsed: float, world: int) -> float:
    """Average gradients and elapsed time over the processes, so that all take the same step and stop together."""
    tensors = [torch.tensor([elapsed]), *(p.grad for p in model.parameters())]
    if world > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / world).split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))
    return tensors[0].item()


class Corpus(NamedTuple):
    """The text as the loop needs it."""

    tokenizer: PreTrainedTokenizerFast
    training: list[torch.Tensor]  # token ids, one tensor a document
    held_out: torch.Tensor  # [windows, context] token ids
    bytes_per_token: float  # of the held-out text
    facts: dict[str, Any]


def read_corpus(arguments: Namespace) -> Corpus:
    """Train the tokenizer on the training text and encode both splits."""
    training = [text for _, text in documents("train", include_tests=True)]
    held_out = [text for _, text in documents("heldout")]
    context = arguments.max_position_embeddings
    tokenizer = train_tokenizer(training, arguments.vocab_size, context)
    encoded, stream = encode(tokenizer, training), torch.cat(encode(tokenizer, held_out))
    held_out_bytes = sum(len(text.encode()) for text in held_out)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "training_bytes": sum(len(text.encode()) for text in training),
        "training_tokens": sum(map(len, encoded)),
        "held_out_bytes": held_out_bytes,
        "held_out_tokens": len(stream),
        "recipe": {key: value for key, value in vars(arguments).items() if key not in ("out", "run", "resume")},
    }
    windows = stream[: len(stream) // context * context].view(-1, context)
    return Corpus(tokenizer, encoded, windows, held_out_bytes / len(stream), facts)


def checkpoint(
    arguments: Namespace, corpus: Corpus, model: LlamaForCausalLM, optimizer: AdamW, progress: dict, row: dict
) -> None:
    """Measure on held-out text, then write the model directory and the state to resume from."""
    # An eighth of the held-out text is enough for the curve; the last number is on all of it.
    windows = corpus.held_out if progress["seconds"] >= 60 * arguments.minutes else corpus.held_out[::8]
    row = row | {"held_out_bits_per_byte": round(bits_per_byte(model, windows, corpus.bytes_per_token), 4)}
    progress["curve"].append(row)
    facts = corpus.facts | {"parameters": model.num_parameters()} | row | {"curve": progress["curve"]}
    write_model(model, corpus.tokenizer, facts, arguments.out)
    save_state(arguments.run / "state.safetensors", model, optimizer, progress)
    print(json.dumps(row), flush=True)


def train(arguments: Namespace, corpus: Corpus, rank: int, world: int) -> None:
    """The training loop."""
    model = build_model(arguments, corpus.tokenizer.bos_token_id)
    optimizer = build_optimizer(model, arguments.lr)
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": math.log(arguments.vocab_size), "curve": []}
    if arguments.resume:
        progress = load_state(arguments.run / "state.safetensors", model, optimizer)
    forward = torch.compile(model) if arguments.compile else model
    elapsed, start = progress["seconds"], time.monotonic() - progress["seconds"]
    next_checkpoint = elapsed + 60 * arguments.checkpoint_minutes
    recent = torch.tensor(progress["loss"], device=arguments.device)  # smoothed over some 50 steps
    feed = batches(corpus.training, arguments.batch, arguments.max_position_embeddings, arguments.seed)
    for step, batch in enumerate(islice(feed, progress["step"], None), progress["step"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(arguments, step, elapsed)
        share = batch[rank::world].contiguous().to(arguments.device)
        with torch.autocast(arguments.device, torch.bfloat16):
            loss = forward(share, labels=share).loss
        loss.backward()
        elapsed = share_gradients(model, time.monotonic() - start, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += 0.02 * (loss.detach() - recent)

        due = elapsed >= min(next_checkpoint, 60 * arguments.minutes)
        if due or step % 50 == 0:
            row = {
                "step": step,
                "minutes": round(elapsed / 60, 2),
                "tokens": step * batch.numel(),
                "loss": round(recent.item(), 4),
            }
            with (arguments.run / f"log.{rank}.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            next_checkpoint = elapsed + 60 * arguments.checkpoint_minutes if due else next_checkpoint
        if due and rank == 0:
            progress |= {"step": step, "seconds": elapsed, "loss": row["loss"]}
            checkpoint(arguments, corpus, model, optimizer, progress, row)
        if elapsed >= 60 * arguments.minutes:
            break


def main() -> None:
    """Read the text, train."""
    arguments, (rank, world) = parse_arguments(), join_processes()
    corpus = read_corpus(arguments)
    corpus.facts["processes"] = world
    train(arguments, corpus, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
