"""The prunable layers of a model: views of uniform shape [out, in] over the weights inside its blocks.

Linear layers, GPT-2's Conv1D (stored transposed) and 3-D expert parameters are prunable, and where they are asked for
convolutions (`billhook.architectures.convolutions`) and layers outside of the blocks; embeddings, norms, biases,
routers and the head are not. A weight of unknown layout is refused by name.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.architectures.convolutions import geometry, group_count, is_convolution, matrix, windows
from billhook.architectures.stacks import blocks_of
from billhook.errors import BillhookError

_GATES = frozenset({"gate", "wg", "classifier"})  # routers where experts are beside them, else layers
_TOO_SMALL = 8  # rows or columns: the coefficients of a few numbers save nothing when removed

# Last name components of layers that share the input, and so its statistics, with an earlier layer.
SHARED_INPUTS = frozenset({"k_proj", "v_proj", "up_proj"})

_PLAIN = frozenset({"Linear", "FalconLinear", "Conv1D"})  # class names: a subclass may compute something else
_CONV1D = dict.fromkeys(("gpt2", "openai-gpt"), ("c_attn", "c_proj", "c_fc"))  # last name components, by model_type


@dataclass(frozen=True)
class Layer:
    """One prunable weight.

    `name` is the module's name in `model.named_modules()`, followed by parameter and number for an expert and for a
    group of a convolution; `block` is the index of its block; `kind` is its name inside the block. `expert` is the
    index into a 3-D parameter, or None; `transposed` means that the weight is stored as [in, out]; `group` is that of a
    convolution with several groups, or None.
    """

    name: str
    block: int
    kind: str
    module: nn.Module
    parameter: str
    expert: int | None
    transposed: bool
    group: int | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether the weight is that of a convolution, or of one of its groups."""
        return is_convolution(self.module)

    @property
    def stored(self) -> Tensor:
        """The parameter that holds the weight."""
        stored: Tensor = getattr(self.module, self.parameter)
        return stored

    @property
    def stored_name(self) -> str:
        """The name of that parameter in `model.named_parameters()`."""
        alone = self.expert is None and self.group is None
        return f"{self.name}.{self.parameter}" if alone else self.name.rpartition(".")[0]

    @property
    def weight(self) -> Tensor:
        """A view [out, in] of the stored weight, detached; writing into it changes the model."""
        return self.view(self.stored.detach())

    def view(self, stored: Tensor) -> Tensor:
        """A view [out, in] of the part of a tensor like `self.stored` that belongs to this layer."""
        if self.is_convolution:
            return matrix(stored, group_count(self.module), self.group)
        part = stored if self.expert is None else stored[self.expert]
        return part.T if self.transposed else part

    def inputs(self, x: Tensor) -> Tensor:
        """The rows [..., in] that the weight multiplies, given the input of its module."""
        return windows(self.module, self.group, x) if self.is_convolution else x

    @property
    def sees(self) -> Hashable:
        """What it sees of the input of its module; layers that see the same of one input share their statistics."""
        return (self.group, *geometry(self.module)) if self.is_convolution else ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, columns = self.weight.shape
        return out, columns


def find_layers(model: PreTrainedModel, *, convolutions: bool = False, outside: bool = False) -> list[Layer]:
    """Every prunable layer in model order, with the `convolutions` inside the blocks if wanted, and then the layers
    `outside` of them.

    Raises BillhookError, by name, for a weight of unknown layout, one that is computed from other parameters, one with
    parameters beside it that change what the layer computes, and one that shares memory with another.
    """
    found = [layer for index, place in enumerate(blocks_of(model).items()) for layer in _layers_in(*place, index)]
    layers = [layer for layer in found if convolutions or not layer.is_convolution]
    _check_weights(layers)
    return layers + (layers_outside(model) if outside else [])


def with_linear(model: PreTrainedModel, layers: Iterable[Layer]) -> list[Layer]:
    """All linear layers of a model and those convolutions that are among `layers`, in model order."""
    names = {layer.name for layer in layers if layer.is_convolution}
    return [x for x in find_layers(model, convolutions=bool(names)) if not x.is_convolution or x.name in names]


def layers_outside(model: PreTrainedModel) -> list[Layer]:
    """The linear layers and convolutions outside of the blocks in model order, such as projectors and patch embeddings,
    without the head; their `block` is -1.

    They are pruned only where their modules are made blocks (`billhook.architectures.stacks.add_stacks`). Weights that
    another module has too are left out, and linear children of a model without a base model, which are its heads.
    """
    base, inside = model.base_model, tuple(f"{block}." for block in blocks_of(model))
    unwanted = {model.get_output_embeddings(), *(base.children() if base is model else ()), *_all_routers(model)}
    uses, found = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False)), list[Layer]()
    wanted = {x for x in base.modules() if is_plain_linear(x) or is_convolution(x)} - unwanted
    for name, module in model.named_modules():
        if module in wanted and not f"{name}.".startswith(inside) and uses[id(module.weight)] == 1:
            found += _layers_in(name, module, -1)
    return found


def layers_in(model: PreTrainedModel, block: int) -> list[Layer]:
    """The prunable layers of one block, by its number, without convolutions."""
    prefix, module = list(blocks_of(model).items())[block]
    return [x for x in _layers_in(prefix, module, block) if not x.is_convolution]


def left_out(model: PreTrainedModel) -> dict[str, str]:
    """Why a matrix inside the blocks is not prunable, by the name of its module: a router, or a small linear layer."""
    found = {f"{prefix}.{name}": why for prefix, block in blocks_of(model).items() for name, why in _left_out(block)}
    has_matrix = {name: any(x.ndim == 2 for x in model.get_submodule(name).parameters(recurse=False)) for name in found}
    return {name: why for name, why in found.items() if has_matrix[name]}


def _layers_in(prefix: str, block: nn.Module, index: int) -> Iterator[Layer]:
    excluded = dict(_left_out(block))
    for name, module in block.named_modules():
        if name not in excluded:  # a block that is a layer itself has no name inside
            yield from _layers_of(module, f"{prefix}.{name}".rstrip("."), index, name or prefix.rpartition(".")[2])


def _left_out(block: nn.Module) -> Iterator[tuple[str, str]]:
    """The names inside a block of the modules that are no layers, with the reason."""
    routers = _all_routers(block)
    for name, module in block.named_modules():
        if module in routers:
            yield name, "routes tokens"
        elif isinstance(module, nn.Linear) and min(module.weight.shape) < _TOO_SMALL:
            yield name, f"fewer than {_TOO_SMALL} rows or columns"


def _check_weights(layers: Iterable[Layer]) -> None:
    """Raise BillhookError for a weight that is not what its layer multiplies with, or not the layer's alone: what is
    written into it would be lost, or change something else too."""
    stored = {(id(layer.module), layer.parameter): layer for layer in layers}
    spans = list[tuple[int, int, Layer]]()
    for layer in stored.values():
        if layer.parameter == "weight":
            _check_owned(layer)
        spans.append((*_span(layer), layer))
    spans.sort(key=lambda span: span[:2])
    for (_, stop, one), (start, _, other) in pairwise(spans):
        if start < stop:
            shared = f"{one.name} and {other.name} lie in the same memory (one weight, or parts of one tensor)"
            raise BillhookError(f"{shared}, where a change to one can change the other: give each its own copy.")


def _check_owned(layer: Layer) -> None:
    """Raise BillhookError unless the weight of a module is a parameter that nothing else in the module changes."""
    module, own = layer.module, dict(layer.module.named_parameters(recurse=False))
    others = [name for name, _ in module.named_parameters() if name not in ("weight", "bias")]
    if others and not ("weight" in own and hasattr(module, "quantization_scheme")):  # compressed-tensors' scales
        what = "is changed by" if "weight" in own else "is computed from"
        raise BillhookError(
            f"{layer.name}.weight {what} other parameters ({', '.join(others)}), and what is written into it would not "
            "last: merge the adapter, or remove the parametrization (torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm) first."
        )
    if "weight" not in own or layer.stored.ndim < 2:
        is_none = f"The weight of {layer.name} is not a parameter of its own"
        raise BillhookError(f"{is_none}: make it one, or use FSDP2 in place of FSDP 1, which flattens parameters.")


def _span(layer: Layer) -> tuple[int, int]:
    """The first address of a stored weight and the one after its last; raises BillhookError where values share one."""
    stored = layer.stored
    if stored.is_meta or not (start := stored.data_ptr()):  # without values, and for shards of FSDP2
        return id(stored), id(stored) + 1
    reach = 1 + sum((size - 1) * stride for size, stride in zip(stored.shape, stored.stride(), strict=True))
    if stored.numel() > reach:
        raise BillhookError(f"Values of {layer.name} share memory (Tensor.expand): give the layer a copy (.clone()).")
    return start, start + reach * stored.element_size()


def _all_routers(root: nn.Module) -> set[nn.Module]:
    """The routers inside a module, with what they consist of."""
    return {part for owner in root.modules() for router in _routers(owner) for part in router.modules()}


def _routers(owner: nn.Module) -> list[nn.Module]:
    """The children of a module that route tokens to experts: a few rows that decide everything.

    They are known by their names. Where nothing beside `experts` has such a name, they are the linear layers with one
    output per expert. The number of outputs alone says nothing: the width of other layers can be the number of experts
    as well.
    """
    children = dict(owner.named_children())
    mixture = any("expert" in name and not name.endswith("gate") for name in children)
    named = {name for name in children if "router" in name or name == "shared_expert_gate"}
    named |= _GATES & children.keys() if mixture else set()
    if (experts := children.get("experts")) is None or named:
        return [children[name] for name in named]
    counts = {len(value) for value in experts.parameters(recurse=False) if value.ndim}
    counts |= {len(experts)} if isinstance(experts, nn.ModuleList) else set()
    return [child for child in children.values() if isinstance(child, nn.Linear) and child.out_features in counts]


def _layers_of(module: nn.Module, full: str, block: int, kind: str) -> list[Layer]:
    if isinstance(module, nn.Linear):
        return [Layer(full, block, kind, module, "weight", None, False)]
    if isinstance(module, Conv1D):
        return [Layer(full, block, kind, module, "weight", None, True)]
    if is_convolution(module):
        if (groups := group_count(module)) == 1:
            return [Layer(full, block, kind, module, "weight", None, False)]
        return [Layer(f"{full}.weight.{g}", block, kind, module, "weight", None, False, g) for g in range(groups)]
    layers = []
    for parameter, value in module.named_parameters(recurse=False):
        if value.ndim == 3 and min(value.shape[1:]) > 1 and not isinstance(module, nn.Conv1d):
            transposed = _stored_transposed(module, f"{full}.{parameter}")
            for expert in range(value.shape[0]):
                name, inner = f"{full}.{parameter}.{expert}", f"{kind}.{parameter}"
                layers.append(Layer(name, block, inner, module, parameter, expert, transposed))
    return layers


def _stored_transposed(module: nn.Module, where: str) -> bool:
    """Whether 3-D expert weights are [expert, in, out], as all experts of transformers record except Llama 4's."""
    if type(module).__name__ == "Llama4TextExperts":
        return True
    if not hasattr(module, "is_transposed"):
        what = f"{where} ({type(module).__name__}) is a 3-D weight of unknown layout"
        raise BillhookError(f"{what}: this architecture is not supported.")
    return bool(module.is_transposed)


def check_finite(module: nn.Module, prefix: str = "") -> None:
    """Raise BillhookError naming, after `prefix`, the first parameter or persistent buffer of a module with NaN or
    infinite values; tensors on `meta` are skipped."""
    for name, tensor in module.state_dict(prefix=prefix, keep_vars=True).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:  # or an extra state
            continue
        if torch.isfinite(tensor.sum(dtype=torch.float32)):  # a fast test: NaN and infinity remain in the sum
            continue
        if bad := int((~torch.isfinite(tensor)).sum()):
            wider = " or compute in a wider type (--dtype)" if tensor.dtype == torch.float16 else ""
            raise BillhookError(f"{name} holds {bad} NaN or infinite weights: repair the checkpoint first{wider}.")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` computes x Wᵀ + b and nothing else."""
    return type(module).__name__ in _PLAIN


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module stores its weight as [in, out]."""
    return isinstance(module, Conv1D)


def is_transposed_on_disk(model_type: str, tensor: str) -> bool:
    """Whether a model of this type stores the tensor of this name as [in, out]."""
    return tensor.removesuffix(".weight").rpartition(".")[2] in _CONV1D.get(model_type, ())


@contextmanager
def observable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Make every expert compute its own product, so that it can be observed; restore the implementation afterwards."""
    before = model.config._experts_implementation
    if before == "eager" or not any(layer.expert is not None for layer in find_layers(model)):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
