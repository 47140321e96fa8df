"""The configuration of a model without the parts of its units that were removed.

Most configurations have one width for all blocks, so the same number of parts is stored in every block. Where an entry
is a list with a number for each block (the MLP widths of Gemma 3n), blocks may differ. `per_layer_config` of
`transformers` is not used: its models of one width do not read it. Sizes of heads are written
out, because they no longer follow from the width. Lists with an entry for each block are cut with the blocks.
`LlamaConfig` refuses a number of heads that does not divide the width; the same weights are then a Mistral model
without a window, which computes the same.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from billhook.architectures.units import Unit
from billhook.errors import BillhookError

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WIDTH = 8  # of which the numbers of channels should be multiples, for the sake of kernels and storage types
_NUMBERS = ("mlp_only_layers",)  # lists of the numbers of blocks
_AS_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def stored_counts(model: PreTrainedModel, units: Sequence[Unit], counts: Mapping[str, int]) -> dict[str, int]:
    """How many parts of each unit are stored where `counts` stay: as many, or what the widest block has.

    Parts that are stored and do not stay are zeros. Raises BillhookError for experts, which zeros cannot replace: a
    router would still choose them.
    """
    config, places = model.config, dict[tuple[str, ...], list[Unit]]()
    for unit in units:
        places.setdefault(tuple(_changes(config, unit, counts[unit.name])), []).append(unit)
    stored = {}
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
        (key,) = _changes(model.config, unit, unit.count)
        if not isinstance(getattr(model.config, key), list):
            raise BillhookError(
                f"No program opens {model.config.model_type} models in which blocks have different numbers of experts: "
                f"their configuration has one {key}. Use --shape uniform; transformers, vLLM and llama.cpp open that."
            )


def shape_notes(
    model: PreTrainedModel, units: Sequence[Unit], counts: Mapping[str, int], stored: Mapping[str, int]
) -> list[str]:
    """What should be known about the shape in which `counts` parts of units stay and `stored` parts are stored."""
    notes, channels = [], [unit for unit in units if unit.kind == "channels"]
    differ = [u for u in units if len({stored[v.name] for v in units if v.kind == u.kind and v.count == u.count}) > 1]
    if differ:
        kinds = " and ".join(dict.fromkeys(unit.kind for unit in differ))
        notes.append(
            f"Blocks keep different numbers of {kinds}, which {model.config.model_type} configurations list by block: "
            "transformers and vLLM open that, llama.cpp does not. With --shape uniform all three do."
        )
    odd = {(stored[u.name], u.count, _of_expert(u)): None for u in channels if stored[u.name] % WIDTH}
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
    changes: dict[str, Any] = {}
    for unit in units:
        if counts[unit.name] != unit.count:
            for key, value in _changes(old, unit, counts[unit.name]).items():
                if isinstance(listed := getattr(old, key, None), list):
                    changes.setdefault(key, list(listed))[unit.block] = value
                else:
                    changes[key] = value
    if len(blocks) != depth:
        changes |= _depth({**old.to_dict(), **changes}, blocks, depth)
    own = old.to_dict()
    try:
        for key, value in changes.items():
            setattr(new, key, value)
        new = type(old).from_dict(new.to_dict())
    except Exception as error:  # whatever the configuration's own checks raise
        if kind != "llama" or own.get("attention_bias") or own.get("mlp_bias"):
            reason = " ".join(str(error).split())[:200]
            raise BillhookError(f"{kind} models cannot have that shape: {reason}") from None
        values = {**own, **changes, **_AS_MISTRAL}
        values = {key: value for key, value in values.items() if key not in ("attention_bias", "mlp_bias")}
        new = AutoConfig.for_model(**values)
        note = "Written as a Mistral model, because a Llama configuration refuses this number of heads; it computes"
        return new, {**changes, **_AS_MISTRAL}, [f"{note} the same."]
    new._experts_implementation = getattr(old, "_experts_implementation", None)
    made = new.to_dict()
    return new, {key: value for key, value in made.items() if key not in own or own[key] != value}, []


def _changes(config: Any, unit: Unit, count: int) -> dict[str, Any]:
    """The entries that change where `count` parts of a unit stay."""
    if unit.kind == "heads":
        return _heads(config, unit, count)
    if unit.kind == "experts":
        key = _first(config, _EXPERTS, unit)
        if count < config.num_experts_per_tok:
            raise BillhookError(
                f"{unit.name}: every token goes to {config.num_experts_per_tok} experts, so {count} cannot stay. "
                "Remove less."
            )
        return {key: count}
    if _of_expert(unit) and hasattr(config, "moe_intermediate_size"):
        return {"moe_intermediate_size": count}
    return {_first(config, _WIDTHS, unit): count}


def _of_expert(unit: Unit) -> bool:
    return unit.consumer is not None and unit.consumer.expert is not None


def _heads(config: Any, unit: Unit, count: int) -> dict[str, Any]:
    assert unit.groups is not None
    heads, groups = config.num_attention_heads, unit.count
    size = unit.groups.numel() // heads
    changes = {"num_attention_heads": heads // groups * count, "head_dim": size}
    return changes | ({"num_key_value_heads": count} if hasattr(config, "num_key_value_heads") else {})


def _first(config: Any, names: Sequence[str], unit: Unit) -> str:
    found = next((name for name in names if hasattr(config, name)), None)
    if found is None:
        raise BillhookError(
            f"{config.model_type} models cannot have fewer {unit.kind}: their configuration has no place for it."
        )
    return found


def _depth(config: Mapping[str, Any], blocks: Sequence[int], depth: int) -> dict[str, Any]:
    """The entries that change where only some blocks stay."""
    changes: dict[str, Any] = {"num_hidden_layers": len(blocks)}
    for key, value in config.items():
        if isinstance(value, list) and key in _NUMBERS:
            changes[key] = [blocks.index(i) for i in value if i in blocks]
        elif isinstance(value, list) and len(value) == depth and not key.endswith(("_token_id", "architectures")):
            changes[key] = [value[i] for i in blocks]
    if isinstance(last := config.get("max_window_layers"), int):
        changes["max_window_layers"] = sum(i < last for i in blocks)
    return changes
