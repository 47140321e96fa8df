"""Hugging Face model directories: find, check, load and identify one.

Only safetensors are read: a pickled checkpoint can run any code when it is opened, so it is refused, with advice on how
to convert it. A checkpoint that does not fill the model exactly is an error here; stock `transformers` fills the gaps
with random numbers and warns. Code that comes with a checkpoint runs only with `trust_remote_code`.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.errors import BillhookError
from billhook.store import fitting, not_a_model
from billhook.store.compute import chosen_device, chosen_dtype
from billhook.store.files import digest_of, in_one_line, repair, sha256, untrusted
from billhook.store.layout import PACKED, is_packed
from billhook.store.model_config import model_config
from billhook.store.shards import read_shard, weight_files

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]
_DOWNLOADED += ["[0-9]*_*/*.bin"]  # of sentence-transformers' modules
# all folders but those of sentence-transformers' modules, such as 1_Pooling
_IGNORED = ("[!0-9]*/*", "[0-9][!_0-9]*/*", "[0-9][0-9][!_]*/*", "consolidated*")
_MOST_BLOCKS = 10_000  # where nothing else is known
_DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def resolve(model: str | Path) -> Path:
    """The directory of `model`: an existing directory, or the hub's cache, to which a hub name (`owner/name`) is
    downloaded.

    Raises BillhookError where there is no such model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BillhookError(not_a_model.file(path))
    name = str(model)
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(name) or "/" not in name or path.parent.is_dir():
        raise BillhookError(
            f"There is no model directory at {model}. Give an existing directory or a hub name such as owner/name."
        )
    return _download(name)


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        wanted, ignored = list(_DOWNLOADED), list(_IGNORED)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=ignored))
    except GatedRepoError:
        raise BillhookError(f"{name} is gated on the hub: accept its terms there, then run `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise BillhookError(
            f"There is no directory {name} here and no model {name} on the hub (or it is private). Check the name."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BillhookError(
            f"Cannot download {name} from the hub ({in_one_line(error)}). Check the network or give a directory."
        ) from None


def check_directory(path: Path, *, quantized: bool = False) -> dict[str, Any]:
    """Check that `path` holds a model in safetensors, without reading a weight; returns its configuration.

    Raises BillhookError for: no config.json, missing, incomplete or damaged safetensors, pickled or quantized weights.
    """
    config = read_config(path, quantized=quantized)
    if not (files := weight_files(path)):
        raise BillhookError(_no_weights(path))
    names = [name for file in files for name in read_shard(file).entries]
    if not is_compressed(config) and (packed := not_a_model.packed_tensor(names)):
        raise BillhookError(not_a_model.quantized(path, f" (its files hold {packed})"))
    check_depth(path, config, len(names))
    return config


def read_config(path: Path, *, quantized: bool = False) -> dict[str, Any]:
    """config.json of a model directory; raises BillhookError where it is missing or of a quantized model.

    With `quantized`, a model quantized for compressed-tensors is accepted.
    """
    if not (path / "config.json").is_file():
        raise BillhookError(not_a_model.directory(path))
    config = model_config(path)
    if (config.get("quantization_config") or config.get("compression_config")) and not (
        quantized and is_compressed(config)
    ):
        raise BillhookError(not_a_model.quantized(path))
    return config


def check_depth(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise BillhookError where a configuration has more blocks than the files have tensors: building them might never
    end."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for key, value in ((key, part.get(key)) for part in parts for key in _DEPTH):
        if isinstance(value, int) and value > tensors:
            known = f"its files hold {tensors} tensors"
            raise BillhookError(f"{path} does not fit its config.json: {key} is {value!r:.20}, and {known}.")


def check_loads(path: Path, tensors: int) -> None:
    """Raise BillhookError unless `transformers` loads the configuration of a model of so many tensors (0: unknown); one
    that needs the model's own Python code is not loaded."""
    config = model_config(path)
    check_depth(path, config, tensors or _MOST_BLOCKS)
    if "AutoConfig" in (config.get("auto_map") or {}) and config.get("model_type") not in transformers.CONFIG_MAPPING:
        return
    with loading(path / "config.json"):
        transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model quantized for the compressed-tensors package."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "compressed-tensors"


def _no_weights(path: Path) -> str:
    if is_packed(path):
        return (
            f"{path} is packed, which can only be loaded for inference: unpack it first, billhook unpack {path} "
            "-o DENSE."
        )
    return not_a_model.directory(path)


def load(
    path: Path,
    auto_class: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantized: bool = False,
) -> PreTrainedModel:
    """Check a model directory and load it in evaluation mode by one of transformers' Auto classes.

    `billhook.store.compute` says what "auto" means. With `quantized`, a model quantized for compressed-tensors is
    loaded with its weights decoded. Raises BillhookError where tensors are missing, left over, or of another shape than
    the configuration says.
    """
    config = check_directory(path, quantized=quantized)
    check_trusted(path, config, auto_class, trust_remote_code)
    device = chosen_device(device)
    dtype = chosen_dtype(dtype, device, path)
    with loading(path):
        shards = [read_shard(file) for file in weight_files(path)]
        unfilled = fitting.empty_model(path, shards, auto_class, trust_remote_code)[1]
        if not is_compressed(config):
            fitting.check_fits(path, unfilled, shards)
        given = fitting.hidden_weights(path, unfilled, shards)
        model = from_pretrained(
            type(unfilled), path, None if given else path, dtype=dtype,
            local_files_only=True, use_safetensors=True, trust_remote_code=trust_remote_code, **given,
        )  # fmt: skip
        if is_compressed(config):  # otherwise they are decoded at the first forward pass
            quantizer: Any = model.hf_quantizer
            quantizer.compressor.decompress_model(model)
    with on_device(device):
        loaded: PreTrainedModel = model.eval().to(device)
    return loaded


def from_pretrained(
    kind: Any, path: Path, source: Path | None, *, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """`kind.from_pretrained(source, ...)` of a model class for the directory `path`, without a pooler where the files
    have none, checked for missing, left over and misshapen tensors.

    Mixture-of-experts models get the `eager` implementation, whose experts are called one by one.
    """
    stored = options.get("state_dict") or fitting.stored_tensors([read_shard(file) for file in weight_files(path)])
    no_values = fitting.empty(stored)
    options |= fitting.pooling(kind, stored)
    model, info = kind.from_pretrained(
        source,
        dtype=dtype,
        experts_implementation="eager",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported by name in `info` instead of by an obscure error
        **options,
    )
    fitting.check_complete(path, info, model, no_values)
    loaded: PreTrainedModel = model
    return loaded


def check_trusted(path: Path, config: dict[str, Any], auto_class: str, trust_remote_code: bool) -> None:
    """Raise BillhookError for a model that needs its own Python code, unless that code is trusted."""
    native = config.get("model_type") in class_names(auto_class)
    if "auto_map" in config and not trust_remote_code and not native:
        raise BillhookError(
            f"{path} needs its own Python code to load. Read it; if you trust it, allow it with trust_remote_code."
        )


def class_names(auto_class: str) -> dict[str, tuple[str, ...]]:
    """The model classes that one of transformers' Auto classes opens, by `model_type`; registered ones too."""
    mapping = getattr(transformers, auto_class)._model_mapping
    own = {config.model_type: (kind.__name__,) for config, kind in mapping._extra_content.items()}
    found = mapping._model_mapping.items()
    return {kind: value if isinstance(value, tuple) else (value,) for kind, value in found} | own


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Suppress output of transformers, and turn its errors for files that it cannot load into BillhookError."""
    # compressed-tensors shows progress bars
    with untrusted(f"transformers cannot load {path}", repair(path)), quiet(), redirect_stderr(StringIO()):
        yield


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Turn errors of a device that is full into BillhookError."""
    try:
        yield
    except RuntimeError as error:
        raise BillhookError(f"Cannot put the model on device {device!r}: {in_one_line(error)}.") from None


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model directory, or None where it has none; raises BillhookError for a damaged one."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((path / name).is_file() for name in names):
        return None
    if lacking := _lacking_packages(path):
        need = f"The tokenizer of {path} is a SentencePiece model (tokenizer.model), which transformers reads with"
        raise BillhookError(f"{need} {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    with untrusted(f"transformers cannot load the tokenizer of {path}", repair(path)), quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        tokenizer.decode(tokenizer("a", verbose=False)["input_ids"])  # some damage shows only in use
    return tokenizer


def _lacking_packages(path: Path) -> list[str]:
    """The packages that are missing for a tokenizer that is only there as a SentencePiece model, not as
    tokenizer.json."""
    model = path / "tokenizer.model"
    if (path / "tokenizer.json").is_file() or not model.is_file():
        return []
    with open(model, "rb") as file:
        if file.read(1) != b"\n":  # the first field of SentencePiece's format; a file for tiktoken is lines of text
            return []
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    return [package for package, module in modules.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def model_digest(path: Path) -> str:
    """Identify a model: SHA-256 over name and SHA-256 of config.json and every weight file, in order of name.

    Of a packed model, its record is used instead of the weight files, whose checksums it contains.
    """
    files = [path / "config.json", *([path / PACKED] if is_packed(path) else weight_files(path))]
    return digest_of({file.name: sha256(file) for file in files})


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and progress bars of transformers; what they could report is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
