"""The units of a model that can be removed whole: MLP channels, groups of attention heads, experts.

A unit consists of parts. Removing a part removes rows of the producers (gate and up, or query, key and value
projections, with their biases) and columns of the consumer (the down or output projection). What the consumer is not
given it does not need: with its columns at zero, the model computes exactly what the smaller model computes. A part of
the heads is one key/value head with all query heads that read it.

Known are the usual names of projections, also fused (gate and up one after another, or in turns as in gpt_oss; query,
key and value one after another). Unknown are attention layers that derive the size of a head from the number of heads,
because no configuration can say that heads are missing there.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_layers
from billhook.architectures.stacks import blocks_of
from billhook.errors import BillhookError

KINDS = ("channels", "heads", "experts", "blocks")
_MLPS = (  # producers and consumer, by the names of a module's children
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_OUTPUTS = ("o_proj", "out_proj", "dense")
_IN_TURNS = frozenset({"gpt_oss"})  # `model_type` of models whose gate and up rows take turns
_SPANNING = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class Slice:
    """What removed parts take away from one tensor: `index` int64 [parts, size] along dimension `dim`.

    `tensor` is its full name in the model; `expert` the entry of the first dimension of a 3-D tensor that is meant, the
    dimensions then being those of the entry.
    """

    tensor: str
    dim: int
    index: Tensor
    expert: int | None = None


@dataclass(frozen=True)
class Unit:
    """Parts that can be removed, all of one kind and size.

    `name` is the module's and the kind, as in plans; `parameters` is what one part holds, everything counted.
    `consumer` is the layer whose columns `groups` int64 [parts, size] the parts feed; experts have none.
    """

    name: str
    kind: str
    block: int
    slices: tuple[Slice, ...]
    parameters: int
    consumer: Layer | None = None
    groups: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of parts."""
        return len(self.slices[0].index)


def find_units(model: PreTrainedModel, kinds: Sequence[str], blocks: Collection[int] | None = None) -> list[Unit]:
    """The units of these kinds (of `channels`, `heads`, `experts`) in `blocks`, by number (None: all), in model order.

    Raises BillhookError, naming the model's type, for a kind that it does not have, or whose layout is unknown.
    """
    layers = {layer.name: layer for layer in find_layers(model)}
    units = list[Unit]()
    for block, (prefix, module) in enumerate(blocks_of(model).items()):
        for name, inner in module.named_modules(prefix=prefix) if blocks is None or block in blocks else ():
            for kind in kinds:
                units += _FINDERS[kind](model, name, inner, block, layers)
    for kind in kinds:
        if not any(unit.kind == kind for unit in units):
            why = _why(kind, any(layer.expert is not None for layer in layers.values()))
            raise BillhookError(f"{model.config.model_type} models have no {kind} that can be removed: {why}.")
    return units


def _why(kind: str, mixture: bool) -> str:
    if kind == "heads":
        return "their configuration cannot say that heads are missing"
    if kind == "experts":
        return "the layout of their router is not known" if mixture else "they are not mixtures of experts"
    return "the layout of their MLP is not known"


def _channels(
    model: PreTrainedModel, name: str, module: nn.Module, block: int, layers: Mapping[str, Layer]
) -> Iterator[Unit]:
    children = dict(module.named_children()) | dict(module.named_parameters(recurse=False))
    for producers, down in _MLPS:
        if down not in children or not all(key in children for key in producers) or "shared_expert" in name:
            continue
        if isinstance(children[down], nn.Parameter):
            yield from _expert_channels(model, name, module, block, layers)
        elif (consumer := layers.get(f"{name}.{down}")) is not None:
            width = consumer.shape[1]
            made = [layer for key in producers if (layer := layers.get(f"{name}.{key}")) is not None]
            slices = [s for layer in made for s in _rows(layer, _turns(model, layer.shape[0], width))]
            if made and all(s.index.numel() for s in slices):
                yield _unit(f"{name}:channels", "channels", block, slices, consumer, torch.arange(width)[:, None])
        return


def _expert_channels(
    model: PreTrainedModel, name: str, module: nn.Module, block: int, layers: Mapping[str, Layer]
) -> Iterator[Unit]:
    """The channels of each expert of a 3-D parameter."""
    for expert in range(int(module.get_parameter("down_proj").shape[0])):
        consumer, layer = layers[f"{name}.down_proj.{expert}"], layers[f"{name}.gate_up_proj.{expert}"]
        width = consumer.shape[1]
        index = _turns(model, layer.shape[0], width)
        slices = [Slice(f"{name}.gate_up_proj", 1 if layer.transposed else 0, index, expert)]
        if hasattr(module, "gate_up_proj_bias"):
            slices.append(Slice(f"{name}.gate_up_proj_bias", 0, index, expert))
        yield _unit(f"{name}.{expert}:channels", "channels", block, slices, consumer, torch.arange(width)[:, None])


def _turns(model: PreTrainedModel, rows: int, width: int) -> Tensor:
    """The rows of a producer that belong to each of `width` channels, int64 [width, rows per channel]."""
    each = rows // width
    if model.config.model_type in _IN_TURNS:
        return torch.arange(rows).view(width, each)
    return torch.arange(rows).view(each, width).T.contiguous()


def _heads(
    model: PreTrainedModel, name: str, module: nn.Module, block: int, layers: Mapping[str, Layer]
) -> Iterator[Unit]:
    children, size = dict(module.named_children()), getattr(module, "head_dim", None)
    output = next((key for key in _OUTPUTS if key in children), None)
    consumer = None if output is None else layers.get(f"{name}.{output}")
    if consumer is None or not isinstance(size, int):
        return
    queries = consumer.shape[1]
    fused = layers.get(f"{name}.qkv_proj")
    if fused is not None:
        keys = (fused.shape[0] - queries) // 2
    elif f"{name}.k_proj" in layers:
        keys = layers[f"{name}.k_proj"].shape[0]
    else:
        return
    groups, key_groups = torch.arange(queries).view(keys // size, -1), torch.arange(keys).view(keys // size, -1)
    if fused is not None:
        slices = list(_rows(fused, torch.cat([groups, queries + key_groups, queries + keys + key_groups], dim=1)))
    else:
        parts = (("q_proj", groups), ("k_proj", key_groups), ("v_proj", key_groups))
        slices = [s for key, index in parts for s in _rows(layers[f"{name}.{key}"], index)]
    slices += _of_each_head(model, name, module, consumer, keys // size)
    yield _unit(f"{name}:heads", "heads", block, slices, consumer, groups)


def _of_each_head(
    model: PreTrainedModel, name: str, module: nn.Module, consumer: Layer, groups: int
) -> Iterator[Slice]:
    """Parameters with a value for each head; raises BillhookError for a norm over several heads, or over the inputs of
    the output projection."""
    width = consumer.shape[1]
    for norm, inner in module.named_children():
        weight = getattr(inner, "weight", None)
        whole = norm in _SPANNING and (weight is None or weight.ndim != 1 or len(weight) != module.head_dim)
        if whole or (weight is not None and weight.ndim == 1 and len(weight) == width != module.head_dim):
            raise BillhookError(
                f"{model.config.model_type} models have no heads that can be removed: {name}.{norm} is computed over "
                "several heads together."
            )
    if isinstance(sinks := getattr(module, "sinks", None), nn.Parameter):
        yield Slice(f"{name}.sinks", 0, torch.arange(len(sinks)).view(groups, -1))


def _experts(
    model: PreTrainedModel, name: str, module: nn.Module, block: int, layers: Mapping[str, Layer]
) -> Iterator[Unit]:
    found = router_of(module)
    if found is None:
        return
    key, router = found
    if (groups := getattr(router, "num_group", getattr(router, "n_group", 1)) or 1) > 1:
        raise BillhookError(
            f"{model.config.model_type} models have no experts that can be removed: the router {name}.{key} first "
            f"chooses among {groups} groups of experts, which would have to stay of one size."
        )
    inner = module.get_submodule("experts")
    each = torch.arange(len(inner.get_parameter("down_proj")))[:, None]
    held = [(f"{key}.{p}", value) for p, value in _tensors(router)]
    held += [(p, value) for p, value in _tensors(module, recurse=False)]  # such as the biases of experts
    held = [(p, value) for p, value in held if len(each) in value.shape]
    held += [(f"experts.{p}", value) for p, value in inner.named_parameters()]
    slices = [Slice(f"{name}.{p}", value.shape.index(len(each)), each) for p, value in held]
    sizes = [value.numel() // len(each) for _, value in held if isinstance(value, nn.Parameter)]
    yield Unit(f"{name}:experts", "experts", block, tuple(slices), sum(sizes))


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module by name."""
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def router_of(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The name and module of what sends tokens to the experts of a mixture, or None for another module."""
    experts = getattr(module, "experts", None)
    down = getattr(experts, "down_proj", None)
    if not isinstance(experts, nn.Module) or not isinstance(down, nn.Parameter):
        return None
    for key in ("gate", "router"):
        router = getattr(module, key, None)
        if not isinstance(router, nn.Module) or not hasattr(router, "top_k"):
            continue
        if any(weight.ndim == 2 and len(weight) == len(down) for weight in router.parameters()):
            return key, router
    return None


_FINDERS = {"channels": _channels, "heads": _heads, "experts": _experts}


def _rows(layer: Layer, index: Tensor) -> Iterator[Slice]:
    yield Slice(f"{layer.name}.{layer.parameter}", 1 if layer.transposed else 0, index)
    if getattr(layer.module, "bias", None) is not None:
        yield Slice(f"{layer.name}.bias", 0, index)


def _unit(name: str, kind: str, block: int, slices: Sequence[Slice], consumer: Layer, groups: Tensor) -> Unit:
    own = Slice(consumer.stored_name, 0 if consumer.transposed else 1, groups, consumer.expert)
    width = consumer.shape[0]  # of the model: rows of the consumer, columns of the producers
    each = [s.index.shape[1] * (1 if s.tensor.endswith(("bias", "sinks")) else width) for s in (*slices, own)]
    return Unit(name, kind, block, (*slices, own), sum(each), consumer, groups)
