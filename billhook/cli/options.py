"""Options that several commands share: aliases, and groups of options that a command receives as one object."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from typer.models import ArgumentInfo

from billhook.cli.common import say
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, ON_MODEL
from billhook.plan.recipes import RECIPES


def output_option(meaning: str) -> Any:
    """The option --output, with its help text."""
    return typer.Option("--output", "-o", help=meaning)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Model = Annotated[str, typer.Argument(help="Model directory, GGUF file, or a name on the hub.")]
AnyModel = Annotated[str, typer.Argument(help="Model directory, dense or packed, GGUF file, or a name on the hub.")]


def fraction(given: str | float) -> float:
    """A sparsity as a number (also a default, which is not a text), or in per cent with the sign %."""
    text = str(given)
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number: write 0.6 or 60%.") from None


Sparsity = Annotated[
    float | None,
    typer.Option(parser=fraction, metavar="FRACTION", help="Of the prunable weights to remove: 0.6 or 60%."),
]
Pattern = Annotated[str, typer.Option(help="unstructured, or N:M (keep N of every M), such as 2:4.")]


def _one_of(meaning: str, names: Callable[[], list[str]], shown: Sequence[str]) -> typer.models.OptionInfo:
    """An option that takes a name: its help shows the built-in ones, and shells complete those of plugins too."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    option: typer.models.OptionInfo = typer.Option(
        help=f"{meaning}: {', '.join(shown)}; by default as in the recipe.", metavar="NAME", autocompletion=complete
    )
    return option


Criterion = Annotated[str | None, _one_of("Which weights go", CRITERIA.names, CRITERIA.built_in)]
Allocator = Annotated[
    str | None,
    _one_of("Sparsity of each layer", lambda: [*ALLOCATORS.names(), *ON_MODEL], [*ALLOCATORS.built_in, *ON_MODEL]),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: FILE.txt, FILE.jsonl (field text, or messages of a chat), .json, .csv, .parquet, .gz, "
        "TOKENS.safetensors, hub:NAME[:config][:split], stdlib:train; for an image model a folder of images, FILE.npz "
        "or hub:NAME; for an image-text model FILE.jsonl with image, question and answer.",
        metavar="SOURCE",
    ),
]
TEMPLATE_HELP = (
    "For a gguf file: one that llama.cpp's convert_hf_to_gguf.py made of this model. Its metadata and tokenizer are "
    "taken, and the names of tensors of an unknown architecture."
)
SPLIT_HELP = "Split a gguf file into NAME-00001-of-0000N.gguf with at most so many bytes of tensors each, such as 4GB."
LENGTH_HELP = "Tokens in a window; by default 2048, or the model's context length if that is shorter."
Length = Annotated[int | None, typer.Option(help=LENGTH_HELP, min=2)]
BOS_HELP = "Begin every window with the BOS token; auto: if the tokenizer does so with a text."
Bos = Annotated[Literal["auto", "yes", "no"], typer.Option(help=BOS_HELP)]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave out images that cannot be read, and say which; without it they are refused."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Score at most this many windows (word protocol: documents).", min=1)]
STACKS_HELP = (
    "Only blocks of these stacks: all, language, vision, or the name of a module that contains them. Repeatable.  "
    "[default: language for image-text models, else all]"
)
DRY_RUN_HELP = "Show the types of the layers, the memory needed, and the time, measured on a part; write no model."
SpillGib = Annotated[
    float, typer.Option(help="GiB of activations to keep in memory; more go to temporary files (TMPDIR).", min=0)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the method: billhook ls lists them. Repeatable.", metavar="KEY=VALUE"),
]
BitsRecipe = Annotated[
    Literal["good", "best"],
    typer.Option(help="best: scales, norms and biases of every block are tuned as well, in several times the time."),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="fast, good or best (each slower and better), or a published method such as wanda or owl@70: see billhook "
        "ls recipes.  [default: good]",
        metavar="NAME",
        autocompletion=lambda incomplete: [name for name in RECIPES if name.startswith(incomplete)],
    ),
]


@dataclass(frozen=True)
class Text:
    """The calibration windows."""

    calibration: Calibration = None
    samples: Annotated[int, typer.Option(help="Calibration windows, or images.", min=1)] = 128
    length: Length = None
    bos: Bos = "auto"
    skip_unreadable: SkipUnreadable = False
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Draw windows (and count zeros, and accumulate gradients) as the released code of the papers does.",
        ),
    ] = False


@dataclass(frozen=True)
class Loading:
    """How to load a model."""

    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1.")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type to compute in; auto is float32 on a processor and the checkpoint's on a GPU."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python code that comes with the model. Read that code first.")
    ] = False

    def fields(self, model: str, *, streams: bool = True) -> dict[str, Any]:
        """The options with the device and dtype that `auto` means for a model; they are printed first.

        `streams` says whether the command can read a model that does not fit in memory one block at a time.
        """
        from billhook.architectures.sources import resolve
        from billhook.store.checkpoint import is_compressed
        from billhook.store.compute import chosen_device, chosen_dtype, dtype_name, lacking_gib, stored_dtype
        from billhook.store.model_config import model_config

        path, device = resolve(model), chosen_device(self.device)
        dtype, stored = chosen_dtype(self.dtype, device, path), stored_dtype(path)
        weights = "" if stored is None else f"; the weights of {path.resolve().name} are {dtype_name(stored)}"
        say(f"Computing on {device} in {dtype_name(dtype)}{weights}.")
        lacking = lacking_gib(path, dtype, device)
        if lacking is not None and not (streams and is_compressed(model_config(path))):  # those are refused
            then = "they are read one block at a time" if streams else "use --dtype bfloat16 or free some memory"
            say(f"The weights need {lacking[0]:.1f} GiB and {lacking[1]:.1f} GiB are free: {then}.")
        return {**vars(self), "device": device, "dtype": dtype_name(dtype)}


@dataclass(frozen=True)
class Choosing(Loading):
    """How to load a model, and which layers to work on."""

    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these layers: a class name (Linear, Conv2d), an exact name, or re:REGEX. Repeatable.",
            metavar="PATTERN",
        ),
    ] = None
    ignore: Annotated[
        list[str] | None, typer.Option(help="Skip these layers; same patterns. Repeatable.", metavar="PATTERN")
    ] = None
    stacks: Annotated[list[str] | None, typer.Option(help=STACKS_HELP, metavar="NAME")] = None

    def fields(self, model: str, *, streams: bool = True) -> dict[str, Any]:
        """The fields of a request."""
        given = {key: getattr(self, key) or () for key in ("targets", "ignore", "stacks")}
        return {**super().fields(model, streams=streams), **given}


@dataclass(frozen=True)
class Work(Choosing):
    """How to load a model, how to compute, and which layers to work on."""

    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass; by default by size.", min=1)] = None
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0


@dataclass(frozen=True)
class Writing:
    """What is written, and where."""

    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists, or an unfinished run.")] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run after the last part that it finished.")
    ] = False


@dataclass(frozen=True)
class GgufWriting(Writing):
    """The same, and the form of GGUF files."""

    template: Annotated[Path | None, typer.Option(help=TEMPLATE_HELP, metavar="FILE")] = None
    split_size: Annotated[str | None, typer.Option(help=SPLIT_HELP, metavar="SIZE")] = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose annotation is a dataclass by that class's options, which `command` receives as one
    object.

    Paths may begin with ~, which shells leave as it is after a `=`.
    """
    signature = inspect.signature(command)
    groups: dict[str, Any] = {x.name: x.annotation for x in signature.parameters.values() if is_dataclass(x.annotation)}
    fields = {name: inspect.signature(group).parameters for name, group in groups.items()}

    @functools.wraps(command)
    def run(**options: Any) -> None:
        options = {key: x.expanduser() if isinstance(x, Path) else x for key, x in options.items()}
        objects = {name: group(**{key: options.pop(key) for key in fields[name]}) for name, group in groups.items()}
        command(**options, **objects)

    flat = [x for own in signature.parameters.values() for x in fields.get(own.name, {own.name: own}).values()]
    parameters = [x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in flat]
    for name, info in ((x.name, info) for x in flat for info in get_args(x.annotation)):
        if isinstance(info, ArgumentInfo) and info.metavar is None:
            info.metavar = name.upper()
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
