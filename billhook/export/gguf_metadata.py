"""The metadata of a GGUF file that describes a model: its name and origin, its sizes, and what was done to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from billhook import __version__
from billhook.store.files import untrusted

if TYPE_CHECKING:
    from gguf import GGUFWriter

Fact = str | int | float | bool


def add_origin(writer: "GGUFWriter", source: Path) -> None:
    """Name, authors, licence and sampling, from the model card, generation_config.json and the directory's name."""
    import gguf

    total, shared, expert, experts = writer.get_total_parameter_count()
    name = source.stem if source.suffix == ".gguf" else None  # made of such a file
    if source.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION in the hub's cache
        name = source.parents[1].name.rpartition("--")[2]
    with untrusted(f"{source / 'README.md'} is not a model card", "Repair or remove it."):
        gguf.Metadata.load_model_card(source)
    origin = gguf.Metadata.load(None, source, name, total)
    origin.name = origin.name or source.name
    origin.size_label = origin.size_label or gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    origin.set_gguf_meta_model(writer)


def add_sizes(writer: "GGUFWriter", sizes: Mapping[str, Any]) -> None:
    """Add `billhook.architectures.gguf_config.gguf_sizes`, in the types that llama.cpp reads."""
    for key, value in sizes.items():
        kind = {int: "uint32", float: "float32"}.get(type(value), "string")
        getattr(writer, f"add_{kind}")(key, value)


def add_facts(writer: "GGUFWriter", facts: Mapping[str, Fact]) -> None:
    """Add `facts` under `billhook.`, with the version of Billhook."""
    for key, value in {"version": __version__, **facts}.items():
        kind = {bool: "bool", int: "int64", float: "float64"}.get(type(value), "string")
        getattr(writer, f"add_{kind}")(f"billhook.{key}", value)
