"""What results may not depend on: the state of the process and of a model in memory, pinned while a function runs.

The state is torch's default dtype and device, inference and grad mode, autocast, the precision of float32 products, its
random numbers (some models draw them in evaluation mode too, such as ViTMAE), and the training mode of a model.
`pinned` marks the public functions that compute. Models that they cannot work with are refused by name.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from billhook.errors import BillhookError

P = ParamSpec("P")
R = TypeVar("R")
_OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
_inside = ContextVar("inside", default=False)
# Precisions of float32 products with which a process starts, by backend and operation, outer ones first: "none" is that
# of the outer one, and of the outermost full precision.
_PRECISIONS = {("generic", "all"): "none"}
_PRECISIONS |= {("cuda", "all"): "none", ("cuda", "matmul"): "none", ("cuda", "conv"): "tf32", ("cuda", "rnn"): "tf32"}
_PRECISIONS |= {("mkldnn", operation): "none" for operation in ("all", "matmul", "conv", "rnn")}


def pinned(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run in the standard state, with the models among its arguments checked and in evaluation mode."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _inside.get():
            return function(*args, **kwargs)
        models = [value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        for model in models:
            check_model(model, streamed="resources" in kwargs)
        with standard_state(), ExitStack() as modes:
            for model in models:
                modes.enter_context(evaluating(model, outputs=False))
            return function(*args, **kwargs)

    return run


@contextmanager
def standard_state() -> Iterator[None]:
    """Put torch in the state in which a process starts, and restore its state afterwards."""
    dtype, token = torch.get_default_dtype(), _inside.set(True)
    with ExitStack() as stack:
        stack.callback(_inside.reset, token)
        if torch.get_default_device().type != "cpu":  # only then, because it slows down every call of torch
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(same_random_numbers())
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(_full_precision())
        yield


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Let torch draw the same random numbers every time, and go on with its own afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products as a process does when it starts; restore the settings for each backend afterwards.

    The setting for all backends is read after these, because torch raises an error where they contradict it.
    """
    with ExitStack() as stack:
        if hasattr(torch._C, "_set_fp32_precision_setter"):  # since torch 2.9
            for place, start in _PRECISIONS.items():
                own = torch._C._get_fp32_precision_getter(*place)  # not that of an outer one, which is "none" by now
                if own != start:  # only then, because what was never set follows the outer ones in its own way
                    stack.callback(torch._C._set_fp32_precision_setter, *place, own)
                    torch._C._set_fp32_precision_setter(*place, start)
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            stack.callback(torch.set_float32_matmul_precision, precision)
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def evaluating(model: nn.Module, *, outputs: bool = True) -> Iterator[None]:
    """Put the model in evaluation mode (no dropout), and restore the mode of every module afterwards.

    With `outputs`, its configuration asks for the usual outputs meanwhile, and no others.
    """
    config = getattr(model, "config", None) if outputs else None
    before = {key: getattr(config, key) for key in _OUTPUTS if hasattr(config, key)}
    training = [module for module in model.modules() if module.training]
    model.eval()
    places = {key: f"_{key}" if f"_{key}" in vars(config) else key for key in before}  # without the checks of setters
    for key, place in places.items():
        setattr(config, place, _OUTPUTS[key])
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(config, places[key], value)
        for module in training:
            module.training = True


def check_model(model: nn.Module, *, streamed: bool = False) -> None:
    """Raise BillhookError, saying what to do, for a wrapped model, one with adapters, and one without its weights.

    With `streamed`, the weights of blocks may be on disk.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = "what is inside it (PeftModel.merge_and_unload(), DataParallel.module, the model before torch.compile)"
        raise BillhookError(f"The model must be a transformers PreTrainedModel, got {kind}: give {inside}.")
    merge = "merge it first (PeftModel.merge_and_unload()), or load the model without it"
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # peft's name for the layer that an adapter wraps
            raise BillhookError(f"{name} has an adapter: {merge}.")
    for name, value in model.named_parameters():
        if any(part.lower().startswith("lora_") for part in name.split(".")):
            raise BillhookError(f"{name} belongs to an adapter: {merge}.")
        if value.is_meta and not streamed:
            load = (
                "load the model without device_map and offloading, or give its directory, which is read block by block"
            )
            raise BillhookError(f"{name} is on the meta device, without values: {load}.")
        if value.is_inference():
            raise BillhookError(f"{name} was made in torch.inference_mode: load the model outside of it.")
