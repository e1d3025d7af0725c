"""Stream calibration samples through the decoder, one layer at a time.

Gemma 3 has two attention masks and two RoPE bases, so nothing about a layer's arguments is rebuilt here: the model's own
forward runs once with recorders in place of its layers, and each layer is then called with exactly what it would have
received. Memory: hidden states of all samples and the moments of one layer, never the activations of the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma_opt.calibration.samples import Sample
from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Role, role_of

# Linears that read the same tensor, in the order in which they run.
STEPS = ((Role.QUERY, Role.KEY, Role.VALUE), (Role.OUTPUT,), (Role.GATE, Role.UP), (Role.DOWN,))


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear's input x over the calibration tokens, float32, means over tokens.

    square: [in], E[x²]. hessian: [in, in], E[xᵀx], or None where only `square` was asked. cross: [in, in], E[x₀ᵀx] with x₀
    the input of the same linear in the dense model, or None. tokens: how many.
    """

    square: Tensor
    hessian: Tensor | None
    cross: Tensor | None
    tokens: int

    @property
    def input_norm(self) -> Tensor:
        """[in]: the L2 norm of each input over all calibration tokens."""
        return (self.square * self.tokens).sqrt()


@dataclass
class _Stream:
    """One version of the model: its layer, and the hidden states that enter it, one [1, tokens, hidden] a sample."""

    layer: nn.Module
    states: list[Tensor]


class Block:
    """One decoder layer with everything that enters it. `name` is its path in the model, `layer` the live module."""

    def __init__(self, name: str, streams: list[_Stream], arguments: list[Mapping[str, object]]) -> None:
        self.name = name
        self._streams = streams
        self._arguments = arguments

    @property
    def layer(self) -> nn.Module:
        return self._streams[0].layer

    def steps(self, names: Sequence[str]) -> list[list[str]]:
        """The named linears of this layer, grouped by the input they share, in the order in which they run."""
        own = [name for name in names if name.startswith(f"{self.name}.")]
        groups = [[name for name in own if role_of(name) in step] for step in STEPS]
        return [group for group in groups if group]

    @torch.no_grad()
    def moments(self, names: Sequence[str], *, full: bool = True) -> dict[str, Moments]:
        """Moments of the inputs of these linears as the layer now is. Linears with one input share one result.

        full: the Hessian too, and the cross moments where the walk follows the dense model.
        """
        groups = self.steps(names)
        leaders = [group[0].removeprefix(f"{self.name}.") for group in groups]
        sums = {leader: _Sums(full) for leader in leaders}
        for index in range(len(self._arguments)):
            seen = [self._inputs(stream, index, leaders) for stream in self._streams]
            for leader in leaders:
                sums[leader].add(*(inputs[leader] for inputs in seen))
        return {name: sums[leader].mean() for leader, group in zip(leaders, groups, strict=True) for name in group}

    @torch.no_grad()
    def advance(self) -> None:
        """Run the layer as it now is; its outputs replace the hidden states (they enter the next layer)."""
        for stream in self._streams:
            for index, state in enumerate(stream.states):
                stream.states[index] = stream.layer(state, **self._arguments[index])

    def _inputs(self, stream: _Stream, index: int, leaders: list[str]) -> dict[str, Tensor]:
        """What the named linears of one stream receive for one sample, [tokens, in]. Runs no further than the last of them."""
        seen: dict[str, Tensor] = {}

        def keep(leader: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen[leader] = inputs[0].reshape(-1, inputs[0].shape[-1])
                if len(seen) == len(leaders):
                    raise _EnoughSeen

            return hook

        handles = [stream.layer.get_submodule(leader).register_forward_pre_hook(keep(leader)) for leader in leaders]
        try:
            stream.layer(stream.states[index], **self._arguments[index])
        except _EnoughSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen


class _EnoughSeen(Exception):
    """Ends a layer's forward early: the rest of its output is not needed."""


class _Sums:
    """Running sums of one linear's moments."""

    def __init__(self, full: bool) -> None:
        self._full = full
        self._tokens = 0
        self._square: Tensor | float = 0.0
        self._hessian: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """x, dense: [tokens, in]."""
        x = x.float()
        self._tokens += x.shape[0]
        if not self._full:
            self._square = self._square + x.square().sum(dim=0)
            return
        if self._hessian is None:
            self._hessian = x.new_zeros(x.shape[1], x.shape[1])
            self._cross = None if dense is None else torch.zeros_like(self._hessian)
        self._hessian.addmm_(x.T, x)
        if dense is not None and self._cross is not None:
            self._cross.addmm_(dense.float().T, x)

    def mean(self) -> Moments:
        if self._hessian is None:
            return Moments(torch.as_tensor(self._square) / self._tokens, None, None, self._tokens)
        hessian = self._hessian.div_(self._tokens)
        cross = None if self._cross is None else self._cross.div_(self._tokens)
        return Moments(hessian.diagonal().clone(), hessian, cross, self._tokens)


def walk_layers(model: GemmaModel, samples: Sequence[Sample], *, follow_dense: bool = False) -> Iterator[Block]:
    """Every decoder layer in turn. Between two of them the caller measures, changes the layer and calls `advance`.

    follow_dense: run the unchanged model beside it, for cross moments; costs a second set of hidden states and one more
    layer's weights. Samples are sent through the vision tower and the embedding once.
    """
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    states, arguments = _record(model, samples)
    dense_states = list(states)
    for index, layer in enumerate(decoder.layers):
        streams = [_Stream(layer, states)]
        if follow_dense:
            streams.append(_Stream(copy.deepcopy(layer), dense_states))
        yield Block(f"{prefix}.layers.{index}", streams, arguments[index])


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with, and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []
        self.arguments: list[Mapping[str, object]] = []

    def forward(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        self.states.append(hidden_states)
        self.arguments.append(arguments)
        return hidden_states


@torch.no_grad()
def _record(model: GemmaModel, samples: Sequence[Sample]) -> tuple[list[Tensor], list[list[Mapping[str, object]]]]:
    """The hidden states that enter the first layer, and for every layer the other arguments of every sample."""
    with _recorders(model) as recorders:
        for sample in samples:
            model(**model_inputs(model, sample), use_cache=False, logits_to_keep=1)
            for recorder in recorders:
                _share_last_(recorder.arguments)
        return recorders[0].states, [recorder.arguments for recorder in recorders]


@contextmanager
def _recorders(model: GemmaModel) -> Iterator[list[_Recorder]]:
    decoder = model.get_decoder()
    layers = decoder.layers
    recorders = [_Recorder() for _ in layers]
    decoder.layers = nn.ModuleList(recorders)
    try:
        yield recorders
    finally:
        decoder.layers = layers


def _share_last_(arguments: list[Mapping[str, object]]) -> None:
    """Let a sample share masks and rotary tables with the one before it, where they are equal."""
    if len(arguments) > 1 and _equal(*arguments[-2:]):
        arguments[-1] = arguments[-2]


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


def model_inputs(model: GemmaModel, sample: Sample) -> dict[str, Tensor]:
    """A sample as keyword arguments of the model's forward."""
    embedding = model.get_input_embeddings().weight
    ids = sample.token_ids.to(embedding.device)
    if sample.images is None:
        return {"input_ids": ids}
    return {
        "input_ids": ids,
        "pixel_values": sample.images.to(embedding.device, embedding.dtype),
        "token_type_ids": (ids == model.config.image_token_id).long(),
    }
