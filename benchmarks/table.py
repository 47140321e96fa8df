"""Perplexity after pruning with every allocator x criterion x sparsity: `billhook compare` on the models of MODELS.

    python benchmarks/table.py                               the bundled model, on the standard library of Python
    python benchmarks/table.py --folder FOLDER --write docs/allocator_comparison.md

FOLDER holds `models/NAME` and `text/FILE` as named in `MODELS`; missing models are skipped. Allocators have their
published defaults; `auto` is chosen by racing on half of the calibration windows. Every cell is stored in --output when
it is finished, so an interrupted run continues, and a finished one only writes the tables.
"""

import argparse
import sys
from pathlib import Path

from billhook.comparison.grid import Grid, compare
from billhook.comparison.views import markdown
from billhook.demo import CALIBRATION, EVALUATION_WINDOWS, HELD_OUT, LENGTH, MODEL, SAMPLES

STORIES = ("tinystories_train1000.jsonl", "tinystories_heldout.jsonl")
WIKI = ("c4_validation_2k.jsonl", "wikitext2_test_raw.txt")
MODELS = {  # name: calibration text, evaluation text, tokens per window
    "bundled": (CALIBRATION, HELD_OUT, LENGTH),
    "stories260k": (*STORIES, 256),
    "babyllama-105": (*STORIES, 256),
    "c4gut-llama-12x128": (*WIKI, 128),
    "c4gut-llama-8x128": (*WIKI, 128),
}
ALLOCATORS = ("uniform", "alphapruning", "atp", "owl", "dlp", "er", "lamp", "global", "sensitivity", "auto")
CRITERIA = ("magnitude", "wanda", "gblm", "sparsegpt")
BEGIN, END = "<!-- benchmarks/table.py: begin -->", "<!-- benchmarks/table.py: end -->"


def tables(name: str, options: argparse.Namespace) -> str:
    """The comparison of one model as Markdown; runs what is missing."""
    *texts, length = MODELS[name]
    bundled = name == "bundled"
    calibration, data = (text if bundled else str(options.folder / "text" / text) for text in texts)
    return markdown(
        compare(
            MODEL if bundled else options.folder / "models" / name,
            Grid(sparsities=(0.5, 0.6, 0.7), allocators=ALLOCATORS, criteria=options.criterion or CRITERIA),
            data,
            limit=EVALUATION_WINDOWS,
            output=options.output / name,
            progress=lambda line: print(f"{name} {line}", file=sys.stderr, flush=True),
            calibration=calibration,
            samples=SAMPLES,
            length=length,
            dtype="float32",
        )
    )


def write(path: Path, text: str) -> None:
    """Put the tables between the markers of a document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} has no markers {BEGIN} and {END}.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("shared"), help="where models/ and text/ are")
    parser.add_argument("--output", type=Path, default=Path("build/table"), help="one directory of results per model")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="only these (default all)")
    parser.add_argument("--criterion", choices=CRITERIA, action="append", help="only these (default all)")
    parser.add_argument("--write", type=Path, help="a document with markers; the tables go between them")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    there = [n for n in options.model or MODELS if n == "bundled" or (options.folder / "models" / n).is_dir()]
    text = "\n\n".join(tables(name, options) for name in there)
    if options.write:
        write(options.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
