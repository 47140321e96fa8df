"""The loss of files of a size: llama.cpp's own quantizer with an importance matrix, and ours in as many bytes.

    python benchmarks/front.py MODEL --llamacpp llama.cpp/build/bin --calibration c4.jsonl --data wiki.test.raw \\
        --folder front --peers Q2_K,Q3_K_M,Q4_K_M --picture front.svg
    python benchmarks/front.py MODEL ... --peers Q2_K --form compress --set sweeps=2       only these

For every peer type there are three rows: `llama.cpp` is the file of `llama-quantize --imatrix`; `same types` has the
same type for every tensor, and our codes (`--allocator like:FILE`); `compress` is `billhook compress --size` with the
bytes of that file, and is not larger. A peer that is a size, such as 80MB, has the last row alone. All are calibrated
on the same windows, and scored by `llama-perplexity --kl-divergence` against the model in float16, on the first
--chunks windows of 512 tokens of --data, of which it scores the second half. Nothing is chosen on that text. `minutes`
and `GiB` are the processor time and the largest resident set of what makes the file: `llama-imatrix` on the text of the
windows and `llama-quantize`, or the command of ours.

--levels DIR uses what an earlier file of `compress` measured; `minutes` are then those of the rest.

Rows are added to FOLDER/rows.jsonl as they come, and those that are there are not measured again. --speed adds how fast
llama.cpp generates with the file of `compress`, as a ratio to its own of that size.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.store.files import write_text
from billhook.text.windows import load_calibration

FORMS = ("llama.cpp", "same types", "compress")
FIGURES = {
    "ppl": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "kl": r"Mean\s+KLD:\s*([-\d.]+)",
    "error": r"Mean\s+KLD:\s*[-\d.]+ ±\s*([\d.]+)",
    "kl_999": r"99\.9%\s+KLD:\s*([-\d.]+)",
    "same_top": r"Same top p:\s*([\d.]+)",
}
COLUMNS = (
    "size like",
    "file",
    "MB",
    "bits",
    "KL",
    "of llama.cpp's",
    "99.9 %",
    "same top",
    "perplexity",
    "minutes",
    "GiB",
)


def ran(*command: str | Path) -> tuple[str, float, float]:
    """The output of a command, its processor time in minutes and its largest resident set in GiB."""
    with tempfile.TemporaryFile("w+") as answer:
        child = subprocess.Popen([str(word) for word in command], stdout=answer, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        answer.seek(0)
        output = answer.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {child.returncode}\n{output[-2000:]}")
    return output, (used.ru_utime + used.ru_stime) / 60, used.ru_maxrss / 2**20


def billhook(*words: str | Path) -> tuple[str, float, float]:
    """What a command of ours prints, and what it takes."""
    return ran(sys.executable, "-m", "billhook", *words)


class Bench:
    """A model with the files that all rows need: float16, importance matrix, and the float16 model's predictions."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name = args, args.model.resolve().name
        self.folder = args.folder / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = ["--calibration", args.calibration, "--samples", args.samples, "--length", args.length]
        self.identity = {"model": self.name, "calibration": args.calibration.name, "data": args.data.name}
        self.identity |= {"samples": args.samples, "length": args.length, "chunks": args.chunks}
        self.dense, self.imatrix = self.folder / "f16.gguf", self.folder / "imatrix.gguf"
        self.predictions = self.folder / f"f16-{args.chunks}.kld"

    def tool(self, name: str, *words: str | Path | int) -> tuple[str, float, float]:
        """What a program of llama.cpp prints, and what it takes."""
        return ran(self.args.llamacpp / f"llama-{name}", *map(str, words))

    def prepare(self) -> None:
        """Make the files that are missing."""
        if not self.dense.exists():
            billhook("export", self.args.model, "--to", "gguf", "--type", "f16", "--output", self.dense)
        if not self.imatrix.exists():
            text, part = self.folder / "calibration.txt", self.folder / "imatrix.part.gguf"
            write_text(text, calibration_text(self.args))
            words = (
                "--file",
                text,
                "--ctx-size",
                self.args.length,
                "--threads",
                self.args.threads,
                "--no-ppl",
                "--parse-special",
            )
            _, *used = self.tool("imatrix", "--model", self.dense, *words, "--output-file", part)
            write_text(self.imatrix.with_suffix(".json"), json.dumps(used))
            part.rename(self.imatrix)
        if not self.predictions.exists():
            part = self.predictions.with_suffix(".part")
            self.perplexity(self.dense, "--kl-divergence-base", part)
            part.rename(self.predictions)

    def perplexity(self, file: Path, *words: str | Path) -> str:
        """The output of llama-perplexity."""
        where = [
            "--file",
            self.args.data,
            "--ctx-size",
            512,
            "--chunks",
            self.args.chunks,
            "--threads",
            self.args.threads,
        ]
        return self.tool("perplexity", "--model", file, *where, *words)[0]

    def score(self, file: Path) -> dict[str, float]:
        """The figures of a file."""
        output = self.perplexity(file, "--kl-divergence-base", self.predictions, "--kl-divergence")
        found = {name: re.search(pattern, output) for name, pattern in FIGURES.items()}
        return {name: float(match[1]) for name, match in found.items() if match is not None}

    def make(self, peer: str, form: str) -> tuple[Path, float | None, float]:
        """The file of a row, and the processor time (None if it was resumed) and memory that it takes."""
        theirs, output = self.folder / f"{peer}.gguf", self.folder / f"{peer}-{form.replace(' ', '-')}"
        if form == "llama.cpp":
            quantize = ("--imatrix", self.imatrix, self.dense, theirs, peer, self.args.threads)
            _, minutes, memory = self.tool("quantize", *quantize)
            before, most = json.loads(self.imatrix.with_suffix(".json").read_text())
            return theirs, minutes + before, max(memory, most)
        settings = [word for setting in self.args.set for word in ("--set", setting)]
        chosen = ["--types", self.args.types] if self.args.types else []
        stopped = output.with_name(f"{output.name}.partial").exists()
        words = [*map(str, self.text), *settings, "--resume" if stopped else "--overwrite"]
        size = ["--size", peer if _is_size(peer) else str(theirs.stat().st_size)]
        known = ["--levels", self.args.levels] if self.args.levels else []
        how = ["--allocator", f"like:{theirs}"] if form == "same types" else [*size, *chosen, *known]
        found = billhook("compress", self.args.model, *how, *words, "--output", output)
        write_text(output / "output.txt", found[0])
        return output / f"{output.name}.gguf", None if stopped else found[1], found[2]

    def row(self, peer: str, form: str) -> dict[str, Any]:
        """Make and score a file."""
        file, minutes, memory = self.make(peer, form)
        facts = {"identity": self.identity, "peer": peer, "form": form, "bytes": file.stat().st_size}
        facts |= {
            "settings": {}
            if form == "llama.cpp"
            else {"set": self.args.set, "types": self.args.types, "levels": self.args.levels}
        }
        return facts | self.score(file) | {"minutes": minutes, "memory": memory}

    def speed(self, peer: str) -> dict[str, Any]:
        """How fast llama.cpp generates with the file of `compress`, as a ratio to its own."""
        rates = []
        for file in (self.folder / f"{peer}-compress" / f"{peer}-compress.gguf", self.folder / f"{peer}.gguf"):
            words = ("--model", file, "-p", 0, "-n", 32, "-r", 3, "-t", self.args.threads, "-o", "json")
            output = self.tool("bench", *words)[0]
            rates.append(json.loads(output[output.index("[") : output.rindex("]") + 1])[0]["avg_ts"])
        return {"identity": self.identity, "peer": peer, "form": "speed", "ratio": rates[0] / rates[1]}


def _is_size(peer: str) -> bool:
    """Whether a peer is a size and not a type of llama.cpp."""
    return peer[:1].isdigit()


def calibration_text(args: argparse.Namespace) -> str:
    """The text of the calibration windows."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = load_calibration(str(args.calibration), tokenizer, samples=args.samples, length=args.length)
    return "".join(tokenizer.batch_decode(tokens.ids))


def markdown(rows: Sequence[dict[str, Any]], parameters: int) -> str:
    """The rows as a table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    theirs = {row["peer"]: row["kl"] for row in rows if row["form"] == "llama.cpp"}
    for row in rows:
        size = f"{row['bytes'] / 1e6:.1f} | {8 * row['bytes'] / parameters:.2f}"
        ratio = f"{row['kl'] / theirs[row['peer']]:.2f}" if row["form"] != "llama.cpp" and row["peer"] in theirs else ""
        loss = f"{row['kl']:.4f} ± {row['error']:.4f} | {ratio} | {row['kl_999']:.2f} | {row['same_top']:.1f} %"
        took = " | ".join("" if row[key] is None else f"{row[key]:.1f}" for key in ("minutes", "memory"))
        lines.append(f"| {row['peer']} | {row['form']} | {size} | {loss} | {row['ppl']:.2f} | {took} |")
    return "\n".join(lines)


def picture(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Loss against size, a line for each way of making files, as SVG."""
    series = []
    for form, label in (("llama.cpp", "llama-quantize, importance matrix"), ("compress", "billhook compress")):
        points = sorted((row["bytes"] / 1e6, row["kl"], row["peer"]) for row in rows if row["form"] == form)
        if not points:
            continue
        labels = [f"{label}, {peer}: {size:.0f} MB, KL {kl:.4f}" for size, kl, peer in points]
        series.append(Series(label, [p[0] for p in points], [p[1] for p in points], labels=labels))
    axes = Axis("size of the file (MB)"), Axis("KL divergence, nats a token", log=True)
    summary = "Measured by llama-perplexity on WikiText-2. Lower is better."
    return chart(f"{name}: loss by size of the GGUF file", series, *axes, summary=summary, standalone=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llamacpp", type=Path, required=True, help="folder of llama-quantize and the other programs")
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on, such as C4")
    parser.add_argument("--data", type=Path, required=True, help="text to score, such as WikiText-2's raw test text")
    parser.add_argument("--folder", type=Path, required=True, help="where files are made and rows are kept")
    parser.add_argument("--peers", default="Q2_K,IQ3_XXS,Q3_K_M,Q4_K_M", help="types of llama-quantize, or sizes")
    parser.add_argument("--form", choices=FORMS, action="append", help="only these rows (default all)")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--chunks", type=int, default=16, help="windows of 512 tokens that are scored")
    parser.add_argument("--set", action="append", default=[], help="an option of gptq, such as sweeps=2")
    parser.add_argument("--types", default="", help="types that compress chooses from")
    parser.add_argument("--levels", default="", help="output of compress whose measured errors are used")
    parser.add_argument("--name", default="", help="what the picture calls the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", action="store_true", help="measure decoding too")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and print the table."""
    args = arguments()
    bench, path = Bench(args), args.folder / "rows.jsonl"
    bench.prepare()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["identity"] == bench.identity]
    parameters = bench.dense.stat().st_size // 2
    for peer in args.peers.split(",") if args.peers else ():
        forms = ["compress"] if _is_size(peer) else [*(args.form or FORMS), *(["speed"] if args.speed else [])]
        for form in forms:
            if not any((row["peer"], row["form"]) == (peer, form) for row in rows):
                rows.append(bench.speed(peer) if form == "speed" else bench.row(peer, form))
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(peer, form, rows[-1].get("kl", rows[-1].get("ratio")), flush=True)
    made = [row for row in rows if row["form"] in FORMS]
    sizes = {row["peer"]: row["bytes"] for row in made if row["form"] == "llama.cpp" or _is_size(row["peer"])}
    made.sort(key=lambda row: (sizes[row["peer"]], FORMS.index(row["form"])))
    print(markdown(made, parameters))
    for row in rows:
        if row["form"] == "speed":
            print(f"{row['peer']}: our file generates {row['ratio']:.2f} times as fast as llama.cpp's.")
    if args.picture is not None:
        write_text(args.picture, picture(args.name or bench.name, made))


if __name__ == "__main__":
    main()
