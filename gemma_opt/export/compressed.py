"""Quantized text linears in the format of the compressed-tensors library, which vLLM and transformers read.

Nothing is rounded anew: the same integers and scales, laid out its way. Weight-only integers, and all of four bits, are packed
into int32; the others are stored as they are. Vision tower, projector and table are floats in such a folder, as is usual there.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from gemma_opt.errors import UsageError
from gemma_opt.export.tensors import Stored
from gemma_opt.policy import Plan, PlanRow, Role
from gemma_opt.quantization import Int4Linear, Int8Linear, QuantizedLinear
from gemma_opt.quantization.grid import SYMMETRIC_ZERO, unpack_nibbles
from gemma_opt.quantization.linear import RowsLinear
from gemma_opt.recipe import FLOATS, FP8_FORMATS, Int4, Int8, Int8DynamicInt4, StoredFormat

PACKAGE = "compressed-tensors"
NEVER = ("re:.*vision_tower.*", "re:.*multi_modal_projector.*", "lm_head")
_LEAVES = {
    Role.QUERY: "q_proj", Role.KEY: "k_proj", Role.VALUE: "v_proj", Role.OUTPUT: "o_proj",
    Role.GATE: "gate_proj", Role.UP: "up_proj", Role.DOWN: "down_proj",
}  # fmt: skip

Tree = dict[str, object]


def refuse_missing() -> None:
    """Raises UsageError where the library is not installed."""
    if find_spec("compressed_tensors") is None:
        raise UsageError(f"{PACKAGE} is not installed: pip install '.[export]' in the repository's folder")


def kept_roles(plan: Plan) -> dict[StoredFormat, list[Role]]:
    """Format → the text roles that keep it. What low rank has split is multiplied out again, and so kept by none."""
    kept: dict[StoredFormat, list[Role]] = {}
    for role in _LEAVES:
        rows = [row for row in plan.rows if row.role is role]
        if rows and all(_kept(row) for row in rows):
            kept.setdefault(rows[0].format, []).append(role)
    return kept


def _kept(row: PlanRow) -> bool:
    return not isinstance(row.format, FLOATS) and not row.name.endswith((".left", ".right"))


def transformers_must_dequantize(plan: Plan) -> bool:
    """Whether transformers (5.23) cannot load such a folder as it is: it expects zero points that are not packed."""
    return any(isinstance(stored, Int4 | Int8DynamicInt4) and not stored.symmetric for stored in kept_roles(plan))


def config_of(plan: Plan) -> Tree:
    """The `quantization_config` of config.json. Raises UsageError where no text linear is quantized."""
    from compressed_tensors.quantization import QuantizationConfig

    kept = kept_roles(plan)
    if not kept:
        raise UsageError(f"this model has no quantized text linears: export it with --format transformers, not {PACKAGE}")
    groups = {
        f"group_{number}": {
            "targets": _patterns(roles),
            "weights": _weights(stored),
            "input_activations": _inputs(stored),
            "format": _layout(stored),
        }
        for number, (stored, roles) in enumerate(kept.items())
    }
    layouts = {_layout(stored) for stored in kept}
    quantized = {role for roles in kept.values() for role in roles}
    tree: Tree = {
        "config_groups": groups,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [*NEVER, *_patterns([role for role in _LEAVES if role not in quantized])],
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


def _patterns(roles: Sequence[Role]) -> list[str]:
    return [f"re:.*{_LEAVES[role]}$" for role in roles]


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
