"""Why a file or directory that is given as a model is none, and how to make one of it."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from billhook.store.layout import RECORD
from billhook.store.shards import INDEX, SINGLE

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# of GPTQ and AWQ, compressed-tensors, and bitsandbytes; older files of GPTQ say so in no config.json
_QUANTIZED = (".qweight", ".weight_packed", ".absmax", ".SCB")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z")


MERGE_MASKED = (
    "An ordinary merge would lose the zeros: load it with PeftModel.from_pretrained(MODEL, ADAPTER, config="
    "billhook.masked_lora(LoraConfig.from_pretrained(ADAPTER))), and merge with billhook.merge_masked."
)
BESIDE = (
    "It stays beside quantized weights: load them decoded, MODEL = AutoModelForCausalLM.from_pretrained(DIRECTORY, "
    "quantization_config=CompressedTensorsConfig(run_compressed=False)), and it with PeftModel.from_pretrained(MODEL, "
    "ADAPTER)."
)


def packed_tensor(names: Iterable[str]) -> str | None:
    """The first tensor that only a quantized checkpoint has, or None."""
    return next((name for name in names if name.endswith(_QUANTIZED)), None)


def quantized(path: Path, why: str = "") -> str:
    """What to say of a quantized checkpoint."""
    return (
        f"{path} is a quantized checkpoint{why}: start from the unquantized model. Models quantized for "
        "compressed-tensors can be evaluated, and decoded with billhook export --to dense -o DENSE."
    )


def _steps(path: Path) -> list[Any]:
    """The names of the steps in the record of a directory, which may be damaged."""
    steps = _read(path / RECORD).get("steps")
    return [step.get("step") for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def file(path: Path) -> str:
    """A sentence or two about a file."""
    if path.suffix in _ARCHIVES:
        return f"{path} is an archive: unpack it and give the model directory in it."
    if path.suffix in _PICKLED:
        return _pickled(path)
    if path.suffix == ".safetensors" and not (path.parent / "config.json").is_file():
        beside = "config.json and the tokenizer's files are needed, too: put all into one directory and give that"
        return f"{path} holds only weights: {beside}."
    here = (path.parent / "config.json").is_file()
    return f"{path} is a file: give the model directory that holds config.json{f', {path.parent}' if here else ''}."


def directory(path: Path) -> str:
    """A sentence or two about a directory that lacks config.json or weights."""
    if folder := next((name for name in ("config.json", SINGLE, INDEX) if (path / name).is_dir()), None):
        return f"{path / folder} is a directory, not a file: put the file there that it should be."
    names = sorted(entry.name for entry in path.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    if "snapshots" in names:
        return _cached(path)
    if models := [name for name in names if name.startswith("models--")]:
        return f"{path} is a cache of the hub: give one of its models by its name on the hub, {_hub_name(models[0])}."
    if "adapter_config.json" in names:
        base = _read(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        holds = f"{path} holds an adapter of {base!s:.100}, not a whole model"
        if "recover" in (steps := _steps(path)):
            return f"{holds}. {BESIDE if 'quantize' in steps else MERGE_MASKED}"
        merge = f"AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained(NEW)"
        return f"{holds}. Merge them with the package peft: {merge}"
    if "params.json" in names or any(name.startswith("consolidated") for name in names):
        there = "take the files of the same model that are made for transformers (model*.safetensors with config.json)"
        return f"{path} is a checkpoint in the original format of Mistral or Meta: {there}, or convert it to them."
    if "model_index.json" in names:
        return f"{path} is a pipeline of diffusers: give the directory of one of its models."
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{path} holds GGUF files and no safetensors: give one of these files, such as {path / gguf[0]}."
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        return _pickled(path / pickled[0])
    if "config.json" not in names:
        inside = next((name for name in names if (path / name / "config.json").is_file()), None)
        advice = "give the directory of a Hugging Face model" if inside is None else f"give {path / inside}"
        return f"{path} has no config.json: {advice}."
    if weights:
        missing = "no model.safetensors and no model.safetensors.index.json, which says what is in which file"
        return f"{path} holds {weights[0]}, but {missing}: copy or download the missing file."
    return f"{path} has no model.safetensors and no model.safetensors.index.json: the weights are missing."


def _pickled(path: Path) -> str:
    convert = f"AutoModelForCausalLM.from_pretrained({str(path.parent)!r}).save_pretrained(NEW)"
    danger = f"pickled weights ({path.name}), which can run any code when opened"
    return f"{path.parent} holds {danger}. Convert them where you trust them: {convert}"


def _cached(path: Path) -> str:
    """About a folder models--OWNER--NAME of the hub's cache, whose files are in one folder for each commit."""
    commits = sorted(entry for entry in (path / "snapshots").iterdir() if entry.is_dir())
    with suppress(OSError, UnicodeDecodeError):
        commits.insert(0, path / "snapshots" / (path / "refs" / "main").read_text(encoding="utf-8").strip())
    found = next((commit for commit in commits if (commit / "config.json").is_file()), None)
    known = f"give {found}" if found else "it holds no complete model"
    return f"{path} is a folder of the hub's cache: {known}, or the model's name on the hub, {_hub_name(path.name)}."


def _hub_name(folder: str) -> str:
    return folder.removeprefix("models--").replace("--", "/")


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
