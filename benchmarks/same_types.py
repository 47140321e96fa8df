"""Quantize a model with the storage types of another GGUF file of it, tensor by tensor: the same size, other codes.

    python benchmarks/same_types.py MODEL PEER.gguf OUTPUT --calibration c4.jsonl --samples 16 --length 512

It shows what codes give apart from the choice of types: `PEER.gguf` is a file of llama.cpp's quantizer, for example.
"""

import argparse
from pathlib import Path

import billhook
from billhook.export.imatrix import gguf_names
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.plan.storage import stored_bytes
from billhook.store.gguf_file import read_gguf


def plan_like(model: Path, peer: Path) -> Plan:
    """The plan with the types of the file `peer`."""
    tensors = read_gguf(peer).tensors
    weights, outside, size = {}, {}, 0
    for name, (source, *_) in gguf_names(model).items():
        if name not in tensors or len(tensors[name].shape) < 2:
            continue
        if ".layers." in source:
            weights[source.removesuffix(".weight")] = Spec(type=tensors[name].type)
            size += stored_bytes(tensors[name].type, tensors[name].shape[-2:])
        else:
            outside[source] = tensors[name].type
    return Plan(Budget("bytes", size), weights, made_by={"allocator": "explicit", "options": {}, "outside": outside})


def main() -> None:
    """Quantize, and print the size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "peer", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--set", action="append", default=[], help="an option of gptq: sweeps=2")
    args = parser.parse_args()
    plan = plan_like(args.model, args.peer)
    text = {"calibration": args.calibration, "samples": args.samples, "length": args.length}
    options = {
        key: float(value) if "." in value else int(value) for key, _, value in (s.partition("=") for s in args.set)
    }
    lines = {"progress": lambda line: print(line, flush=True), "overwrite": True}
    report = billhook.quantize(args.model, "", args.output, plan=plan, options=options, **text, **lines)
    print(f"{report.size:,} bytes. {report.loss}")


if __name__ == "__main__":
    main()
