"""Linear layers: which modules only compute x Wᵀ + b, and which weights are stored transposed."""

from torch import nn
from transformers.pytorch_utils import Conv1D

_PLAIN = frozenset({"Linear", "FalconLinear", "Conv1D"})  # class names: a subclass may compute something else
_CONV1D = dict.fromkeys(("gpt2", "openai-gpt"), ("c_attn", "c_proj", "c_fc"))  # last name components, by model_type


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` computes x Wᵀ + b and nothing else."""
    return type(module).__name__ in _PLAIN


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module stores its weight as [in, out]."""
    return isinstance(module, Conv1D)


def is_transposed_on_disk(model_type: str, tensor: str) -> bool:
    """Whether a model of this type stores the tensor of this name as [in, out]."""
    return tensor.removesuffix(".weight").rpartition(".")[2] in _CONV1D.get(model_type, ())
