"""Four-bit weights beside auto-round (`pip install auto-round`): loss, processor time and memory on the same windows.

    python benchmarks/four_bits.py smollm2 --calibration c4_validation_2k.jsonl --data wikitext2_test_raw.txt

`int4/64`, symmetric, for all layers in blocks on both sides. Rows: auto-round's plain rounding (`iters=0`) and its
recipe `light` (50 steps a block, learning rate 0.005, batches of 8), on --samples windows of --length tokens; ours are
`round`, `gptq` and `--recipe best`. KL divergence from the dense model and perplexity on --limit windows of --data.
Time and memory are those of a process that loads the model, quantizes it and writes the result.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from billhook.tasks.opening import load_model
from billhook.text.windows import load_calibration

AUTO_ROUND = {"auto-round, rounding": 0, "auto-round, light": 50}
OURS = {
    "round": ["--quantizer", "round"],
    "gptq": [],
    "gptq, --recipe best": ["--recipe", "best"],
}


def tuned_by_auto_round(args: argparse.Namespace, iters: int, output: Path) -> None:
    """Quantize by auto-round, and write the values that its file stands for."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, dtype="float32")
    tokens = load_calibration(str(args.calibration), tokenizer, samples=args.samples, length=args.length).ids
    settings = {"bits": 4, "group_size": 64, "sym": True, "iters": iters, "nsamples": len(tokens)}
    settings |= {"seqlen": args.length, "batch_size": 8, "lr": 5e-3 if iters else None, "device_map": "cpu"}
    settings |= {"dataset": list(tokens.split(1)), "disable_opt_rtn": True, "amp": False}
    quantized, _ = AutoRound(model, tokenizer, **settings).quantize()
    quantized.save_pretrained(output)
    tokenizer.save_pretrained(output)


def ran(command: list[str]) -> tuple[float, float]:
    """Processor minutes and the largest resident set in GiB of a command."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
    return (used.ru_utime + used.ru_stime) / 60, used.ru_maxrss / 2**20


def row(args: argparse.Namespace, name: str, output: Path) -> str:
    """Make one model, score it against the dense one, and return the row of the table."""
    billhook = [sys.executable, "-m", "billhook"]
    if name in AUTO_ROUND:
        taken = ran([sys.executable, *sys.argv, "--iters", str(AUTO_ROUND[name]), "--output", str(output)])
    else:
        text = ["--calibration", str(args.calibration), "--samples", str(args.samples), "--length", str(args.length)]
        words = ["quantize", str(args.model), "--type", "int4/64", *text, *OURS[name], "--output", str(output)]
        taken = ran([*billhook, *words])
    words = ["--data", str(args.data), "--length", str(args.length), "--limit", str(args.limit), "--json"]
    scored = subprocess.run(
        [*billhook, "eval", str(output), "--against", str(args.model), *words], check=True, capture_output=True
    )
    found = json.loads(scored.stdout)
    loss = f"{found['against']['kl']:.4f} | {found['token_ppl']:.2f}"
    return f"| {name} | {loss} | {taken[0]:.1f} | {taken[1]:.1f} |"


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows, separated by semicolons")
    parser.add_argument("--iters", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.output is not None:
        tuned_by_auto_round(args, args.iters, args.output)
        return
    print("| int4/64 | KL | perplexity | minutes | GiB |\n| --- | --- | --- | --- | --- |")
    for name in args.only.split(";") if args.only else [*AUTO_ROUND, *OURS]:
        with tempfile.TemporaryDirectory() as folder:
            print(row(args, name, Path(folder) / "out"), flush=True)


if __name__ == "__main__":
    main()
