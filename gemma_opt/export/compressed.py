"""Quantized text linears in the format of the compressed-tensors library, which vLLM and transformers read.

Nothing is rounded anew: the same integers and scales, laid out its way. Weight-only integers, and all of four bits, are packed
into int32; the others are stored as they are. Vision tower, projector and table are floats in such a folder, as is usual there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from gemma_opt.errors import UsageError
from gemma_opt.export.tensors import Stored
from gemma_opt.policy import Plan
from gemma_opt.quantization import Int4Linear, Int8Linear, QuantizedLinear
from gemma_opt.quantization.grid import SYMMETRIC_ZERO, unpack_nibbles
from gemma_opt.quantization.linear import RowsLinear
from gemma_opt.recipe import FLOATS, FP8_FORMATS, TEXT_ROLES, Int4, Int8, Int8DynamicInt4, StoredFormat

PACKAGE = "compressed-tensors"
NEVER = ("re:.*vision_tower.*", "re:.*multi_modal_projector.*", "lm_head")

Tree = dict[str, object]


def refuse_missing() -> None:
    """Raises UsageError where the library is not installed."""
    if find_spec("compressed_tensors") is None:
        raise UsageError(f"{PACKAGE} is not installed: pip install '.[export]' in the repository's folder")


def kept_formats(plan: Plan) -> dict[str, StoredFormat | None]:
    """Last name of every text linear (`q_proj`, …) → the format that it keeps, or None: floats, as what low rank had split."""
    kept: dict[str, StoredFormat | None] = {}
    for row in plan.rows:
        if row.role in TEXT_ROLES:
            linear = row.name.removesuffix(".left").removesuffix(".right")
            is_float = isinstance(row.format, FLOATS) or linear != row.name
            kept[linear.rpartition(".")[2]] = None if is_float else row.format
    return kept


def transformers_must_dequantize(plan: Plan) -> bool:
    """Whether transformers (5.23) cannot load such a folder as it is: it expects zero points that are not packed."""
    kept = kept_formats(plan).values()
    return any(isinstance(stored, Int4 | Int8DynamicInt4) and not stored.symmetric for stored in kept)


def config_of(plan: Plan) -> Tree:
    """The `quantization_config` of config.json. Raises UsageError where no text linear is quantized."""
    from compressed_tensors.quantization import QuantizationConfig

    kept = kept_formats(plan)
    formats = list(dict.fromkeys(stored for stored in kept.values() if stored is not None))
    if not formats:
        raise UsageError(f"this model has no quantized text linears: export it with --format transformers, not {PACKAGE}")
    groups = {
        f"group_{number}": {
            "targets": _patterns(kept, stored),
            "weights": _weights(stored),
            "input_activations": _inputs(stored),
            "format": _layout(stored),
        }
        for number, stored in enumerate(formats)
    }
    layouts = {_layout(stored) for stored in formats}
    tree: Tree = {
        "config_groups": groups,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [*NEVER, *_patterns(kept, None)],
    }
    return QuantizationConfig.model_validate(tree).model_dump(mode="json")


def stored_tensors(linear: QuantizedLinear, floats: torch.dtype) -> Stored:
    """A quantized linear's tensors as the library names and packs them; the bias is not among them.

    floats: in which the model computes, and the library takes groups of int4 apart.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    match linear:
        case Int4Linear():
            steps = unpack_nibbles(linear.weight_packed).char() - SYMMETRIC_ZERO
            stored = {"weight_packed": pack_to_int32(steps, 4), "weight_scale": linear.weight_scale.to(floats)}
            if linear.weight_zero is not None:
                stored["weight_zero_point"] = pack_to_int32(linear.weight_zero.char() - SYMMETRIC_ZERO, 4, packed_dim=0)
            return stored | _shape(linear)
        case Int8Linear(activation="none"):
            return {"weight_packed": pack_to_int32(linear.weight, 8), **_scales(linear)} | _shape(linear)
        case RowsLinear():
            return {"weight": linear.weight, **_scales(linear)}
        case _:
            raise NotImplementedError(f"{PACKAGE} has no form of {type(linear).__name__}")


def _scales(linear: RowsLinear) -> Stored:
    static = {} if linear.input_scale is None else {"input_scale": linear.input_scale.reshape(1)}
    return {"weight_scale": linear.weight_scale[:, None]} | static


def _shape(linear: QuantizedLinear) -> Stored:
    return {"weight_shape": torch.tensor([linear.out_features, linear.in_features])}


def _patterns(kept: Mapping[str, StoredFormat | None], wanted: StoredFormat | None) -> list[str]:
    return [f"re:.*{name}$" for name, stored in kept.items() if stored == wanted]


def _layout(stored: StoredFormat) -> str:
    if isinstance(stored, FP8_FORMATS):
        return "float-quantized"
    return "pack-quantized" if isinstance(stored, Int8 | Int4 | Int8DynamicInt4) else "int-quantized"


def _weights(stored: StoredFormat) -> Tree:
    if isinstance(stored, Int4 | Int8DynamicInt4):
        return {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": stored.group,
            "symmetric": stored.symmetric,
            "dynamic": False,
        }
    kind = "float" if isinstance(stored, FP8_FORMATS) else "int"
    return {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}


def _inputs(stored: StoredFormat) -> Tree | None:
    if stored.activation == "none":
        return None
    kind, _, when = stored.activation.partition("_")
    static = when == "static"
    return {
        "num_bits": 8,
        "type": "float" if kind == "fp8" else "int",
        "strategy": "tensor" if static else "token",
        "symmetric": True,
        "dynamic": not static,
    }
