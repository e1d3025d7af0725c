"""A second device for machines that have none: the CPU under another name, which refuses what mixes the two.

Values are real, so code that looks at them runs on; what a GPU would refuse is refused: an operation on tensors of both
devices, but for what torch allows (scalars of the CPU, indices on the CPU, copies from one to the other). Speed, memory and
the bits of a GPU's sums are not imitated.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "second"
_CROSS = {"copy_", "_to_copy"}  # may read one device and write the other
_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # take indices of the CPU


class Elsewhere(Tensor):
    """A tensor that lies on the CPU and says that it lies on the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Elsewhere], real: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.held = real
        return made

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Assigning moves the values too, as it does for a plain tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Elsewhere):
            raise RuntimeError("a tensor of the CPU became the data of one elsewhere")
        torch._C.TensorBase.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def tolist(self) -> Any:  # type: ignore[override]
        """As of any tensor; torch has none for subclasses."""
        return self.held.tolist()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None):
        """Called outside `second_device` too: a tensor that outlives it still works."""
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None):
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Generator[torch.device]:
    """Inside, there is a device of that name."""
    _register()
    torch._C._set_only_lift_cpu_tensors(True)  # as FakeTensorMode does: so that `torch.tensor(…, device=…)` comes by here
    try:
        with _Device():
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _NoDevices(backend_registration._DummyBackendModule):
    """What torch asks about devices of that name: there are none that it could use, as for seeds or pinned memory."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def _register() -> None:
    """Once for the whole process: torch wants a name and a guard, whoever then computes."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _NoDevices())


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    _refuse_mixture(func, args, tensors)
    wanted = kwargs.get("device")
    there = any(map(_is_there, tensors)) if wanted is None else torch.device(wanted).type == NAME
    if there and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: a generator of the CPU draws for another device")
    if wanted is not None and torch.device(wanted).type == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
    result = func(*tree_map(_real, args), **tree_map(_real, dict(kwargs)))
    known = {id(_real(tensor)): tensor for tensor in tensors}  # an operation in place gives back what it was given

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in known:
            return known.get(id(value), value)
        return Elsewhere(value) if there else value

    return tree_map(placed, result)


def _refuse_mixture(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """What torch refuses of two devices."""
    name = func._schema.name.removeprefix("aten::")
    if name in _CROSS or not any(map(_is_there, tensors)):
        return
    if name in _INDEX:  # indices may lie on the CPU, but not there where the tensor is not
        tensors = [args[0], *(value for value in args[2:] if isinstance(value, Tensor))]
        wrong = [tensor for tensor in tensors if not _is_there(tensor) and (tensor is args[0] or tensor.dim())]
    else:
        written = {id(value) for value, spec in zip(args, func._schema.arguments, strict=False) if spec.alias_info}
        wrong = [tensor for tensor in tensors if not _is_there(tensor) and (tensor.dim() or id(tensor) in written)]
    if wrong:
        shapes = ", ".join(f"{list(tensor.shape)} on {NAME if _is_there(tensor) else 'cpu'}" for tensor in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {shapes}")


def _is_there(tensor: Tensor) -> bool:
    return isinstance(tensor, Elsewhere)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value
