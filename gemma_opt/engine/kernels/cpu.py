"""The decode step in C++ (cpu.cpp): one call a token, weights and cache used where they lie.

Computes in float32 whatever the weights' format; keys and values are stored in the cache's dtype. Where a model has a
format or a shape it does not know, or this machine no compiler, the engine stays with torch operations.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import singledispatch
from itertools import accumulate

import torch
from torch import Tensor

from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.kernels import build
from gemma_opt.engine.linear import Visible, attend_to_chunk, linear
from gemma_opt.engine.packed import FloatRows, Fp8Rows, GridInput, Int4Rows, Int8Rows, LowRankRows, PackedLinear, Stacked
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import LayerWeights, TextWeights

log = logging.getLogger(__name__)

LANES = 16  # floats in one vector of simd.hpp


class Unsupported(Exception):
    """What cpu.cpp does not compute."""


class _Matrix(Structure):
    _fields_ = (
        ("data", c_void_p), ("scale", c_void_p), ("zero", c_void_p),
        ("out", c_int64), ("columns", c_int64), ("group", c_int64), ("format", c_int32), ("grid", c_int32),
        ("input_scale", c_float), ("unused", c_float),
    )  # fmt: skip


class _Linear(Structure):
    _fields_ = (("last", _Matrix), ("first", _Matrix))


_NORMS = ("input_norm", "query_norm", "key_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")
_LINEARS = ("query", "key", "value", "o", "gate", "up", "down")


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in _NORMS),
        *((name, _Linear) for name in _LINEARS),
        ("keys", c_void_p), ("values", c_void_p), ("length", c_int64), ("sliding", c_int64),
    )  # fmt: skip


class _Model(Structure):
    _fields_ = (
        ("hidden", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64), ("intermediate", c_int64),
        ("window", c_int64), ("context", c_int64), ("slots", c_int64), ("layer_count", c_int64), ("bf16_cache", c_int64),
        *((name, c_float) for name in ("eps", "attention_scale", "embedding_scale", "unused")),
        *((name, c_void_p) for name in ("sliding_cos", "sliding_sin", "full_cos", "full_sin", "final_norm")),
        ("table", _Matrix), ("head", _Linear), ("layers", POINTER(_Layer)),
    )  # fmt: skip


_FLOAT32, _BFLOAT16, _INT8, _INT4, _FP8 = range(5)
_FLOATS = {torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16}
_GRIDS = {"int8": 1, "fp8": 2}


@singledispatch
def _matrix(packed: PackedLinear, rows: slice) -> _Matrix:
    """Some rows of a packed linear."""
    raise Unsupported(f"a {type(packed).__name__}")


@_matrix.register
def _(packed: FloatRows, rows: slice) -> _Matrix:
    if packed.weight.dtype not in _FLOATS:
        raise Unsupported(f"{packed.weight.dtype} weights")
    weight = _dense(packed.weight[rows])
    out, columns = weight.shape
    return _Matrix(data=weight.data_ptr(), out=out, columns=columns, format=_FLOATS[weight.dtype])


@_matrix.register(Int8Rows)
@_matrix.register(Fp8Rows)
def _(packed: Int8Rows | Fp8Rows, rows: slice) -> _Matrix:
    weight, scale = _dense(packed.weight[rows]), _dense(packed.scale[rows])
    out, columns = weight.shape
    stored = _INT8 if isinstance(packed, Int8Rows) else _FP8
    return _Matrix(data=weight.data_ptr(), scale=scale.data_ptr(), out=out, columns=columns, format=stored)


@_matrix.register
def _(packed: Int4Rows, rows: slice) -> _Matrix:
    if packed.group % 32:
        raise Unsupported(f"int4 groups of {packed.group}, not a multiple of 32")
    weight, scale = _dense(packed.packed[rows]), _dense(packed.scale[rows])
    zero = None if packed.zero is None else _dense(packed.zero[rows]).data_ptr()
    size = {"out": weight.shape[0], "columns": 2 * weight.shape[1], "group": packed.group}
    return _Matrix(data=weight.data_ptr(), scale=scale.data_ptr(), zero=zero, format=_INT4, **size)


@_matrix.register
def _(packed: GridInput, rows: slice) -> _Matrix:
    matrix = _matrix(packed.rows, rows)
    matrix.grid = _GRIDS[packed.activation.split("_")[0]]
    matrix.input_scale = 0.0 if packed.input_scale is None else float(packed.input_scale)
    return matrix


def _dense(tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise Unsupported("weights whose rows do not follow each other")
    return tensor


def _split(packed: PackedLinear, widths: Sequence[int]) -> list[_Linear]:
    """A packed linear as the linears it was packed from. Raises Unsupported."""
    if isinstance(packed, Stacked):
        if [part.out_features for part in packed.parts] != list(widths):
            raise Unsupported("linears stacked in another way")
        return [linear for part in packed.parts for linear in _split(part, [part.out_features])]
    if isinstance(packed, LowRankRows):
        if len(widths) > 1:
            raise Unsupported("low-rank linears on top of each other")
        return [_Linear(last=_whole(packed.left), first=_whole(packed.right))]
    ends = list(accumulate(widths))
    return [_Linear(last=_matrix(packed, slice(end - width, end))) for end, width in zip(ends, widths, strict=True)]


def _whole(packed: PackedLinear) -> _Matrix:
    return _matrix(packed, slice(0, packed.out_features))


class CpuLinear:
    """Products with quantized weights in C++; see `kernels.Linear`.

    Exact but for float32 rounding, and nothing is dequantized into memory. What the vendor's library computes faster stays
    with torch: plain floats, and bfloat16 activations but for int8 inputs, whose products here are of integers.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, packed: PackedLinear, x: Tensor) -> Tensor:
        """x: [rows, in] → [rows, out] in x's dtype."""
        match packed:
            case Stacked():
                return torch.cat([self(part, x) for part in packed.parts], dim=-1)
            case LowRankRows():
                return self(packed.left, self(packed.right, x))
            case GridInput() if x.dtype == torch.float32 or packed.activation.startswith("int8"):
                pass
            case Int8Rows() | Fp8Rows() | Int4Rows() if x.dtype == torch.float32:
                pass
            case _:
                return linear(packed, x)
        return multiply(self._library, packed, x.float(), torch.get_num_threads()).to(x.dtype)


def multiply(library: ctypes.CDLL, packed: PackedLinear, x: Tensor, threads: int) -> Tensor:
    """x float32 [rows, in] → float32 [rows, out]. Raises Unsupported."""
    matrix = _whole(packed)
    if not x.is_contiguous() or x.data_ptr() % 64:
        x = x.clone(memory_format=torch.contiguous_format)
    y = torch.empty(len(x), packed.out_features)
    sizes = c_int64(len(x)), c_void_p(y.data_ptr()), c_int64(threads)
    library.gemma_multiply(ctypes.byref(matrix), c_void_p(x.data_ptr()), *sizes)
    return y


class CpuChunkAttention:
    """A `ChunkAttention` in C++ that computes no score which nobody sees. bfloat16 stays with torch."""

    def __init__(self, library: ctypes.CDLL, threads: int | None = None) -> None:
        self._library, self._threads = library, threads

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, visible: Visible, scale: float) -> Tensor:
        """[tokens, heads, head_dim]; see `ChunkAttention`."""
        tokens, heads, head_dim = query.shape
        if query.dtype != torch.float32 or head_dim % LANES:
            return attend_to_chunk(query, keys, values, visible, scale)
        query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
        out = torch.empty_like(query)
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (query, keys, values, visible.begin, visible.end)]
        sizes = [c_int64(size) for size in (tokens, heads, *keys.shape)]
        threads = c_int64(self._threads or torch.get_num_threads())
        self._library.gemma_attend_chunk(*pointers, *sizes, c_float(scale), threads, c_void_p(out.data_ptr()))
        return out


class CpuDecodeStep:
    """`TextModel.decode` in C++. threads: by default torch's own number.

    Raises Unsupported for weights or shapes it does not know.
    """

    def __init__(
        self, weights: TextWeights, cache: KvCache, rope: RopeTables, library: ctypes.CDLL, threads: int | None = None
    ) -> None:
        _check(weights, cache)
        self.library = library
        self._max_rows: int = library.gemma_max_rows()
        self._kept = weights, cache, rope  # the C++ side points into these
        self._limits = weights.shape.vocabulary, cache.slots, cache.context
        library.gemma_step_new.restype = c_void_p
        model = _model(weights, cache, rope)
        step: int = library.gemma_step_new(ctypes.byref(model), c_int64(threads or torch.get_num_threads()))
        self._step = c_void_p(step)
        weakref.finalize(self, library.gemma_step_free, c_void_p(step))

    def __call__(self, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """float32 logits [rows, vocabulary]. tokens, slots, positions: int64 [rows]. Raises IndexError."""
        rows = [values.contiguous() for values in (tokens, slots, positions)]
        for name, values, limit in zip(("token", "slot", "position"), rows, self._limits, strict=True):
            numbers: list[int] = values.tolist()
            if min(numbers) < 0 or max(numbers) >= limit:
                raise IndexError(f"{name}s must be 0 to {limit - 1}, got {numbers}")
        logits = torch.empty(len(tokens), self._limits[0], dtype=torch.float32)
        for begin in range(0, len(tokens), self._max_rows):
            part = [values[begin : begin + self._max_rows] for values in rows]
            pointers = [c_void_p(values.data_ptr()) for values in part]
            count = c_int64(len(part[0]))
            self.library.gemma_step_run(self._step, *pointers, count, c_void_p(logits[begin:].data_ptr()))
        return logits


def find_cpu_step(weights: TextWeights, cache: KvCache, rope: RopeTables) -> CpuDecodeStep | None:
    """The C++ step if this machine can build it and it knows these weights; None, with a line in the log, otherwise."""
    library = build.load_library()
    if library is None:
        return None
    try:
        return CpuDecodeStep(weights, cache, rope, library)
    except Unsupported as reason:
        log.warning("decoding with torch operations, slowly: the C++ step does not know %s", reason)
        return None


def _check(weights: TextWeights, cache: KvCache) -> None:
    if weights.shape.head_dim % LANES:
        raise Unsupported(f"heads of {weights.shape.head_dim}, not a multiple of {LANES}")
    if weights.dtype not in _FLOATS:
        raise Unsupported(f"{weights.dtype} activations")
    if cache.layers[0].keys.dtype != weights.dtype:
        raise Unsupported("a cache of another dtype than the activations")


def _model(weights: TextWeights, cache: KvCache, rope: RopeTables) -> _Model:
    shape = weights.shape
    layers = (_Layer * len(weights.layers))(
        *(_layer(weights, layer, cache, index) for index, layer in enumerate(weights.layers))
    )
    return _Model(
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate=weights.layers[0].gate_up.out_features // 2,
        window=shape.window,
        context=cache.context,
        slots=cache.slots,
        layer_count=len(weights.layers),
        bf16_cache=weights.dtype == torch.bfloat16,
        eps=shape.eps,
        attention_scale=shape.attention_scale,
        embedding_scale=shape.embedding_scale,
        sliding_cos=rope.sliding[0].data_ptr(),
        sliding_sin=rope.sliding[1].data_ptr(),
        full_cos=rope.full[0].data_ptr(),
        full_sin=rope.full[1].data_ptr(),
        final_norm=weights.final_norm.data_ptr(),
        table=_whole(weights.table),
        head=_split(weights.head, [shape.vocabulary])[0],
        layers=layers,
    )


def _layer(weights: TextWeights, layer: LayerWeights, cache: KvCache, index: int) -> _Layer:
    held = cache.layers[index]
    half = layer.gate_up.out_features // 2
    linears = [
        *_split(layer.qkv, weights.shape.qkv_widths),
        *_split(layer.o, [layer.o.out_features]),
        *_split(layer.gate_up, [half, half]),
        *_split(layer.down, [layer.down.out_features]),
    ]
    return _Layer(
        **{name: getattr(layer, name).data_ptr() for name in _NORMS},
        **dict(zip(_LINEARS, linears, strict=True)),
        keys=held.keys.data_ptr(),
        values=held.values.data_ptr(),
        length=held.length,
        sliding=held.sliding,
    )
