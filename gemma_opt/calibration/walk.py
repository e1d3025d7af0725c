"""Stream calibration samples through the decoder, one layer at a time.

Gemma 3 has two attention masks and two RoPE bases, so nothing about a layer's arguments is rebuilt here: the model's own
forward runs once with recorders in place of its layers, and each layer is then called with exactly what it would have
received. Memory: hidden states of all samples and the moments of one layer, never the activations of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gemma_opt.calibration.samples import Sample
from gemma_opt.gemma import GemmaModel, text_layers, weights_device
from gemma_opt.onednn import OneDnnLinears, product, with_onednn
from gemma_opt.policy import Role, role_of

# Linears that read the same tensor, in the order in which they run.
STEPS = ((Role.QUERY, Role.KEY, Role.VALUE), (Role.OUTPUT,), (Role.GATE, Role.UP), (Role.DOWN,))
# Gemma 3 normalises what attention and MLP give before adding it to the residual, so an error in the output of these linears
# matters relative to that token's output. Counted alike, the first token, whose outputs are far larger, would decide alone.
NORMALISED = (Role.OUTPUT, Role.DOWN)


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear's input x over the calibration tokens, float32, means over tokens.

    square: [in], E[x²]. hessian: [in, in], E[w xᵀx], or None where only `square` was asked. cross: [in, in], E[w x₀ᵀx] with
    x₀ the input of the same linear in the dense model, or None. w is 1, or for the linears of `NORMALISED` the inverse mean
    square of their output for that token. tokens: how many.
    """

    square: Tensor
    hessian: Tensor | None
    cross: Tensor | None
    tokens: int

    @property
    def input_norm(self) -> Tensor:
        """[in]: the L2 norm of each input over all calibration tokens."""
        return (self.square * self.tokens).sqrt()


Arguments = Mapping[str, object]


class Block:
    """One decoder layer with everything that enters it. `name` is its path in the model, `layer` the live module."""

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        states: list[Tensor],
        arguments: list[Arguments],
        dense: list[dict[str, Tensor]] | None,
    ) -> None:
        self.name = name
        self.layer = layer
        self._states = states
        self._arguments = arguments
        self._dense = dense

    def steps(self, names: Sequence[str]) -> list[list[str]]:
        """The named linears of this layer, grouped by the input they share, in the order in which they run."""
        return _steps(self.name, names)

    @torch.no_grad()
    @with_onednn
    def moments(self, names: Sequence[str], *, full: bool = True) -> dict[str, Moments]:
        """Moments of the inputs of these linears as the layer now is. Linears with one input share one result.

        full: the Hessian too, and the cross moments where the walk follows the dense model.
        """
        groups = self.steps(names)
        sums = {group[0]: _Sums(full) for group in groups}
        for index, (state, arguments) in enumerate(zip(self._states, self._arguments, strict=True)):
            seen = _inputs(self, state, arguments, list(sums))
            for leader, x in seen.items():
                dense = self._dense[index][leader] if self._dense and full else None
                sums[leader].add(x, dense, self._token_weight(leader, x) if full else None)
        means = {leader: sums[leader].mean() for leader in sums}
        return {name: means[group[0]] for group in groups for name in group}

    def _token_weight(self, leader: str, x: Tensor) -> Tensor | None:
        """[tokens, 1], or None: every token counts alike. See `NORMALISED`."""
        if role_of(leader) not in NORMALISED:
            return None
        path = leader.removeprefix(f"{self.name}.").removesuffix(".right")  # low rank: what left makes of it is normalised
        output = self.layer.get_submodule(path)(x).float()
        return 1 / output.square().mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)

    @torch.no_grad()
    def inputs(self, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
        """What these linears receive as the layer now is, a sample at a time: [tokens, in], and how much each token counts.

        One linear of each input they share is enough. The second is [tokens, 1] or None, as in the moments.
        """
        for state, arguments in zip(self._states, self._arguments, strict=True):
            with OneDnnLinears():
                seen = _inputs(self, state, arguments, list(names))
                found = {name: (x, self._token_weight(name, x)) for name, x in seen.items()}
            yield found

    def __len__(self) -> int:
        """How many samples."""
        return len(self._states)

    def output(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        """What the layer gives for one sample, float32 [1, tokens, hidden], with these weights in the place of its own.

        weights: by the linears' names, float32; products are made in the model's precision.
        """
        state = self._states[index]
        local = {f"{name.removeprefix(f'{self.name}.')}.weight": weight for name, weight in weights.items()}
        with torch.autocast(state.device.type, torch.bfloat16, enabled=state.dtype == torch.bfloat16):
            return functional_call(self.layer, local, (state.float(),), dict(self._arguments[index]))

    @torch.no_grad()
    @with_onednn
    def advance(self) -> None:
        """Run the layer as it now is; its outputs replace the hidden states (they enter the next layer)."""
        for index, (state, arguments) in enumerate(zip(self._states, self._arguments, strict=True)):
            self._states[index] = self.layer(state, **arguments)


def _steps(layer_name: str, names: Sequence[str]) -> list[list[str]]:
    own = [name for name in names if name.startswith(f"{layer_name}.")]
    groups: list[list[str]] = []
    for step in STEPS:
        members = [name for name in own if role_of(name) in step]
        groups.append([name for name in members if not name.endswith(".left")])
        groups += ([name] for name in members if name.endswith(".left"))  # low rank: it reads what its own right gives
    return [group for group in groups if group]


def _inputs(block: Block, state: Tensor, arguments: Arguments, names: list[str]) -> dict[str, Tensor]:
    """What the named linears receive for one sample, [tokens, in]. Runs no further than the last of them."""
    with _noted(block.name, block.layer, names) as seen, suppress(_EnoughSeen):
        block.layer(state, **arguments)
    return seen


@contextmanager
def _noted(layer_name: str, layer: nn.Module, names: list[str], *, stop: bool = True) -> Generator[dict[str, Tensor]]:
    """Note the inputs of the named linears of a layer. stop: raise _EnoughSeen once all are known."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1])
            if stop and len(seen) == len(names):
                raise _EnoughSeen

        return hook

    handles = [layer.get_submodule(name.removeprefix(f"{layer_name}.")).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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

    def add(self, x: Tensor, dense: Tensor | None = None, weight: Tensor | None = None) -> None:
        """x, dense: [tokens, in]; weight: [tokens, 1] or None."""
        x = x.float()
        self._tokens += x.shape[0]
        self._square = self._square + x.square().sum(dim=0)
        if not self._full:
            return
        if self._hessian is None:
            self._hessian = x.new_zeros(x.shape[1], x.shape[1])
            self._cross = None if dense is None else torch.zeros_like(self._hessian)
        weighted = x if weight is None else x * weight
        self._hessian += product(weighted, x)
        if dense is not None and self._cross is not None:
            self._cross += product(dense.float(), weighted)

    def mean(self) -> Moments:
        """Ends the summing: the sums are turned into means in place."""
        if self._hessian is None:
            return Moments(torch.as_tensor(self._square) / self._tokens, None, None, self._tokens)
        hessian = self._hessian.div_(self._tokens)
        cross = None if self._cross is None else self._cross.div_(self._tokens)
        return Moments(torch.as_tensor(self._square) / self._tokens, hessian, cross, self._tokens)


def walk_layers(model: GemmaModel, samples: Sequence[Sample], *, follow_dense: Sequence[str] = ()) -> Iterator[Block]:
    """Every decoder layer in turn. Between two of them the caller measures, changes the layer and calls `advance`.

    follow_dense: linears whose inputs in the unchanged model are wanted too, for cross moments; costs a second set of hidden
    states, one layer's inputs, and one more pass. Samples are sent through the vision tower and the embedding once.
    """
    states, arguments = _record(model, samples)
    dense_states = list(states)
    for (name, layer), given in zip(text_layers(model).items(), arguments, strict=True):
        dense = _dense_pass_(name, layer, dense_states, given, follow_dense) if follow_dense else None
        yield Block(name, layer, states, given, dense)


@torch.no_grad()
@with_onednn
def _dense_pass_(
    name: str, layer: nn.Module, states: list[Tensor], arguments: list[Arguments], names: Sequence[str]
) -> list[dict[str, Tensor]]:
    """Run a layer before anything in it is changed. Returns its linears' inputs; `states` become its outputs."""
    leaders = [group[0] for group in _steps(name, names)]
    noted: list[dict[str, Tensor]] = []
    for index, state in enumerate(states):
        with _noted(name, layer, leaders, stop=False) as seen:
            states[index] = layer(state, **arguments[index])
        noted.append(seen)
    return noted


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with, and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []
        self.arguments: list[Arguments] = []

    def forward(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        self.states.append(hidden_states)
        self.arguments.append(arguments)
        return hidden_states


@torch.no_grad()
@with_onednn
def _record(model: GemmaModel, samples: Sequence[Sample]) -> tuple[list[Tensor], list[list[Arguments]]]:
    """The hidden states that enter the first layer, and for every layer the other arguments of every sample."""
    with _recorders(model) as recorders:
        for sample in samples:
            model(**model_inputs(model, sample), use_cache=False, logits_to_keep=1)
            for recorder in recorders:
                _share_last_(recorder.arguments)
        return recorders[0].states, [recorder.arguments for recorder in recorders]


@contextmanager
def _recorders(model: GemmaModel) -> Generator[list[_Recorder]]:
    decoder = model.get_decoder()
    layers = cast(nn.ModuleList, decoder.layers)
    recorders = [_Recorder() for _ in layers]
    decoder.layers = nn.ModuleList(recorders)
    try:
        yield recorders
    finally:
        decoder.layers = layers


def _share_last_(arguments: list[Arguments]) -> None:
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
    device = weights_device(model)
    ids = sample.token_ids.to(device)
    if sample.images is None:
        return {"input_ids": ids}
    return {
        "input_ids": ids,
        "pixel_values": sample.images.to(device, model.dtype),
        "token_type_ids": (ids == model.config.image_token_id).long(),
    }
