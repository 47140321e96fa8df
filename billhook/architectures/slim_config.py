"""The configuration of a model without the parts of its units that were removed.

Most configurations have one width for all blocks, so the same number of parts is stored in every block. Where an entry
is a list with a number for each block (the MLP widths of Gemma 3n), blocks may differ. `per_layer_config` of
`transformers` is not used: its models of one width do not read it. Sizes of heads are written
out, because they no longer follow from the width. Lists with an entry for each block are cut with the blocks. In the
configuration of a model of several parts, such as LLaVA, the entries are those of the part that a unit is in.
`LlamaConfig` refuses a number of heads that does not divide the width; the same weights are then a Mistral model
without a window, which computes the same.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import Unit
from billhook.errors import BillhookError

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_OF_EXPERTS, _OF_DENSE = ("moe_intermediate_size", *_WIDTHS), ("intermediate_size_mlp", *_WIDTHS)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WIDTH = 8  # of which the numbers of channels should be multiples, for the sake of kernels and storage types
# lists of the numbers of blocks
_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")
# how many of the first blocks are of another kind
_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# how the names end of lists whose length is not the number of blocks, such as a height and a width
_NOT_OF_BLOCKS = (
    *("_token_id", "architectures", "stage_names", "out_features", "out_indices", "_limit", "_section"),
    *("_size", "_shape", "feature_layer", "_ids", "_idxs", "_indices", "_indexes"),
)
_STAGES = ("stage_names", "out_features", "out_indices")  # of a backbone, which follow from the number of blocks
_AS_MISTRAL = {"model_type": "mistral", "sliding_window": None}


def stored_counts(model: PreTrainedModel, units: Sequence[Unit], counts: Mapping[str, int]) -> dict[str, int]:
    """How many parts of each unit are stored where `counts` stay: as many, or what the widest block has.

    Parts that are stored and do not stay are zeros. Raises BillhookError for experts, which zeros cannot replace: a
    router would still choose them.
    """
    alike: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        alike.setdefault((_part(model, unit.name), unit.kind), []).append(unit)
    stored = {unit.name: unit.count for unit in units}
    for (part, _), several in alike.items():
        if any(counts[unit.name] != unit.count for unit in several):
            stored |= _stored(_at(model.config, part), several, counts)
    return stored


def _stored(config: Any, units: Sequence[Unit], counts: Mapping[str, int]) -> dict[str, int]:
    """The same for units of one kind, of which a part with this configuration has less."""
    places, stored = dict[tuple[str, ...], list[Unit]](), dict[str, int]()
    for unit in units:
        places.setdefault(tuple(_changes(config, unit, counts[unit.name])), []).append(unit)
    for keys, alike in places.items():
        listed = all(isinstance(getattr(config, key, None), list) for key in keys)
        most = max(counts[unit.name] for unit in alike)
        for unit in alike:
            if unit.kind == "experts" and not listed and counts[unit.name] != most:
                raise BillhookError(
                    f"{config.model_type} models have one {keys[0]} for all blocks: {counts[unit.name]} experts cannot "
                    f"stay in {unit.name} where {most} stay elsewhere. Use --shape uniform."
                )
            stored[unit.name] = counts[unit.name] if listed else most
    return stored


def check_per_layer(model: PreTrainedModel, units: Sequence[Unit]) -> None:
    """Raise BillhookError where blocks keep different numbers of experts, and no program could open that.

    Channels and heads can always differ: zeros fill them up.
    """
    unit = next((unit for unit in units if unit.kind == "experts"), None)
    if unit is not None:
        config = _at(model.config, _part(model, unit.name))
        (key,) = _changes(config, unit, unit.count)
        if not isinstance(getattr(config, key), list):
            raise BillhookError(
                f"No program opens {model.config.model_type} models in which blocks have different numbers of experts: "
                f"their configuration has one {key}. Use --shape uniform; transformers, vLLM and llama.cpp open that."
            )


def shape_notes(
    model: PreTrainedModel, units: Sequence[Unit], counts: Mapping[str, int], stored: Mapping[str, int]
) -> list[str]:
    """What should be known about the shape in which `counts` parts of units stay and `stored` parts are stored."""
    notes, narrower = [], [u for u in units if u.kind == "channels" and stored[u.name] != u.count]
    differ = [u for u in units if len({stored[v.name] for v in units if v.kind == u.kind and v.count == u.count}) > 1]
    if differ:
        kinds = " and ".join(dict.fromkeys(unit.kind for unit in differ))
        notes.append(
            f"Blocks keep different numbers of {kinds}, which {model.config.model_type} configurations list by block: "
            "transformers and vLLM open that, llama.cpp does not. With --shape uniform all three do."
        )
    odd = {(stored[u.name], u.count, _of_expert(u)): None for u in narrower if stored[u.name] % WIDTH}
    for width, count, of_expert in odd:
        only = " transformers runs such experts with experts_implementation='eager'." if of_expert else ""
        notes.append(
            f"{width} of {count} channels are stored, which {WIDTH} does not divide: types that group columns do not "
            f"fit them.{only}"
        )
    return notes


def slimmed(
    model: PreTrainedModel, units: Sequence[Unit], counts: Mapping[str, int], blocks: Sequence[int], depth: int
) -> tuple[Any, dict[str, Any], list[str]]:
    """The new configuration, its entries that differ from those of config.json, and notes.

    `counts` parts are stored, by unit; of `depth` blocks, those numbered `blocks` stay. Raises BillhookError, naming
    the model's type, where no configuration can say so.
    """
    old, new = model.config, copy.deepcopy(model.config)
    kind = old.model_type
    changes = _all_changes(model, units, counts)
    if len(blocks) != depth:
        part = _part(model, next(iter(blocks_of(model))))
        entries = changes.setdefault(part, {})
        entries |= _depth({**_at(old, part).to_dict(), **entries}, blocks, depth, _usual(_at(old, part)))
    own = old.to_dict()
    try:
        for part, entries in changes.items():
            for key, value in entries.items():
                setattr(_at(new, part), key, value)
        values = new.to_dict()
        if len(blocks) != depth:
            inside = values[part] if part else values
            inside |= dict.fromkeys(key for key in _STAGES if key in inside)
        new = type(old).from_dict(values)
    except Exception as error:  # whatever the configuration's own checks raise
        if kind != "llama" or own.get("attention_bias") or own.get("mlp_bias"):
            reason = " ".join(str(error).split())[:200]
            raise BillhookError(
                f"{kind} models cannot have that shape: {reason}{'' if reason.endswith('.') else '.'} Remove another "
                "share, or other kinds of units."
            ) from None
        entries = {**changes[""], **_AS_MISTRAL, "architectures": [type(model).__name__.replace("Llama", "Mistral")]}
        values = {key: x for key, x in {**own, **entries}.items() if key not in ("attention_bias", "mlp_bias")}
        note = "Written as a Mistral model, because a Llama configuration refuses this number of heads; it computes"
        return AutoConfig.for_model(**values), entries, [f"{note} the same."]
    new._experts_implementation = getattr(old, "_experts_implementation", None)
    made = new.to_dict()
    return new, {key: value for key, value in made.items() if key not in own or own[key] != value}, []


def _all_changes(model: PreTrainedModel, units: Sequence[Unit], counts: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The entries that change where `counts` parts of units are stored, by part of the configuration."""
    changes, names = dict[str, dict[str, Any]](), list(blocks_of(model))
    for unit in units:
        if counts[unit.name] != unit.count:
            part = _part(model, unit.name)
            config, entries = _at(model.config, part), changes.setdefault(part, {})
            for key, value in _changes(config, unit, counts[unit.name]).items():
                if isinstance(listed := getattr(config, key, None), list):
                    entries.setdefault(key, list(listed))[int(names[unit.block].rpartition(".")[2])] = value
                else:
                    entries[key] = value
    return changes


def _part(model: PreTrainedModel, name: str) -> str:
    """The part of the configuration that describes a module or unit, such as `text_config`; empty for all of it.

    Raises BillhookError, naming the model's type, where the parts do not say which of them it is.
    """
    module: Any = model
    config = own = model.config
    for one in name.partition(":")[0].split("."):
        module = getattr(module, "_modules", {}).get(one)
        found = getattr(module, "config", None)
        own = found if isinstance(found, PreTrainedConfig) else own
    if type(own) is type(config):
        return ""
    parts = [key for key in config.sub_configs if type(getattr(config, key, None)) is type(own)]
    if len(parts) != 1:
        who = f"{config.model_type} models cannot be slimmed"
        raise BillhookError(f"{who}: it is not known which part of their configuration describes {name}.")
    return parts[0]


def _at(config: Any, part: str) -> Any:
    return getattr(config, part) if part else config


def _changes(config: Any, unit: Unit, count: int) -> dict[str, Any]:
    """The entries that change where `count` parts of a unit stay."""
    if unit.kind == "heads":
        return _heads(config, unit, count)
    if unit.kind == "experts":
        key = _first(config, _EXPERTS, unit)
        if count < (each := experts_per_token(config)):
            raise BillhookError(
                f"{unit.name}: every token goes to {each} experts, so {count} cannot stay. Remove less."
            )
        return {key: count}
    names = _OF_EXPERTS if _of_expert(unit) else _OF_DENSE
    held = ((name, getattr(config, name, None)) for name in names)
    same = [name for name, value in held if unit.count in (value if isinstance(value, list) else [value])]
    return {_first(config, [*same, *names], unit): count}


def experts_per_token(config: Any) -> int:
    """To how many experts every token goes; the most of them where blocks differ, 1 for a model without experts."""
    each = getattr(config, "num_experts_per_tok", None) or 1
    return max(each) if isinstance(each, list) else int(each)


def _of_expert(unit: Unit) -> bool:
    return unit.consumer is not None and unit.consumer.expert is not None


def _heads(config: Any, unit: Unit, count: int) -> dict[str, Any]:
    assert unit.groups is not None
    heads, groups = getattr(config, _first(config, ("num_attention_heads",), unit)), unit.count
    size = unit.groups.numel() // heads
    changes = {"num_attention_heads": heads // groups * count, "head_dim": size}
    return changes | ({"num_key_value_heads": count} if hasattr(config, "num_key_value_heads") else {})


def _first(config: Any, names: Sequence[str], unit: Unit) -> str:
    found = next((name for name in names if hasattr(config, name)), None)
    if unit.kind == "heads" and isinstance(getattr(config, found or "", None), list):  # of stages
        found = None
    if found is None:
        raise BillhookError(
            f"{config.model_type} models cannot have fewer {unit.kind}: their configuration has no place for it."
        )
    return found


def _usual(config: Any) -> dict[str, Any]:
    """The configuration that its class makes without arguments; empty where it needs some."""
    try:
        made = type(config)()
        return {**made.to_dict(), "num_hidden_layers": made.num_hidden_layers}
    except Exception:  # whatever the configuration's own checks raise
        return {}


def _of_blocks(key: str, usual: Mapping[str, Any]) -> bool:
    """Whether a list with as many entries as there are blocks has one for each: so it is in the `usual` configuration,
    which mostly has another depth; by its name where that has no such list."""
    found = usual.get(key)
    if isinstance(found, list | tuple) and found:
        return len(found) == usual["num_hidden_layers"]
    return key in (*_OF_EXPERTS, *_OF_DENSE) or not key.endswith(_NOT_OF_BLOCKS)


def _depth(config: Mapping[str, Any], blocks: Sequence[int], depth: int, usual: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that change where only some blocks stay."""
    changes: dict[str, Any] = {"num_hidden_layers": len(blocks)}
    for key, value in config.items():
        if isinstance(value, list | tuple) and key in _NUMBERS:
            changes[key] = [blocks.index(i) for i in value if i in blocks]
        elif isinstance(value, list | tuple) and len(value) == depth and _of_blocks(key, usual):
            changes[key] = [value[i] for i in blocks]
        elif key in _FIRST and isinstance(value, int):
            changes[key] = sum(i < value for i in blocks)
    return changes
