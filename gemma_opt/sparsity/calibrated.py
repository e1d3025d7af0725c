"""The methods that measure the model on data, one decoder layer at a time: Wanda, SparseGPT, ADMM, and compact removal.

In sequential order every linear is measured behind all that was pruned before it, inside its own layer too; in one_shot
order behind dense weights only. A finished layer is kept in the store, and a build that was interrupted goes on from
there: loaded weights and unchanged data give the hidden states, and so the result, that the first run would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn

from gemma_opt.calibration import Block, CalibrationData, Moments, Sensitivity, measure_sensitivity, walk_layers
from gemma_opt.errors import PlanError
from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Role, dropped_count, kept_channels, pool_size, role_of
from gemma_opt.recipe import ADMM, Compact, SparseGPT, Wanda, parse_n_m
from gemma_opt.sparsity import blockwise, masks, quadratic, scores, structured
from gemma_opt.sparsity.admm import admm
from gemma_opt.sparsity.allocation import sensitivity_counts
from gemma_opt.sparsity.apply import _Drop, _prune_, _Run
from gemma_opt.sparsity.sparsegpt import sparsegpt

SENSITIVITY_SAMPLES = 8  # spread over the calibration set: 4,000 tokens settle a mean of squares, and a backward pass is dear
_SENSITIVITY = "sensitivity"

NewWeights = dict[str, Tensor]
Change = Callable[[Sequence[str], dict[str, Moments]], NewWeights]  # linears with their moments → weights that replace theirs
# the wanted weight, what errors in it cost, how many fall, how much each row matters → the pruned weight
Prune = Callable[[Tensor, quadratic.Quadratic, int, Tensor | None], Tensor]


@_prune_.register
def _(stage: Wanda, run: _Run) -> dict[str, _Drop]:
    drops, sensitivity = _drops(stage, run)

    def change(names: Sequence[str], moments: dict[str, Moments]) -> NewWeights:
        return {name: _wanda(name, moments[name]) for name in names}

    def _wanda(name: str, moments: Moments) -> Tensor:
        weight = run.weights[name].detach()
        score = scores.wanda(weight, moments.input_norm)
        if sensitivity:
            score = score * sensitivity[name].gradient_square.sqrt()[:, None]
        pool = pool_size(stage, tuple(weight.shape))
        return weight.masked_fill(~masks.of_pattern(score, stage.pattern, drops[name].count * pool // weight.numel()), 0)

    _layer_by_layer_(stage, run, change, full=False)
    return drops


@_prune_.register
def _(stage: SparseGPT, run: _Run) -> dict[str, _Drop]:
    pattern = parse_n_m(stage.pattern) or stage.pattern

    def prune(wanted: Tensor, problem: quadratic.Quadratic, count: int, row_weight: Tensor | None) -> Tensor:
        return sparsegpt(wanted, problem, pattern, count, row_weight)

    return _reconstruct_(stage, run, prune)


@_prune_.register
def _(stage: ADMM, run: _Run) -> dict[str, _Drop]:
    def prune(wanted: Tensor, problem: quadratic.Quadratic, count: int, row_weight: Tensor | None) -> Tensor:
        keep_of = partial(masks.of_pattern, pattern=stage.pattern, count=count)
        return admm(wanted, problem, keep_of, stage.steps, row_weight)

    return _reconstruct_(stage, run, prune)


@_prune_.register
def _(stage: Compact, run: _Run) -> dict[str, _Drop]:
    down_names = [name for name in run.weights if role_of(name) is Role.DOWN]
    width = run.weights[down_names[0]].shape[1]
    keep = kept_channels(stage, width)
    sizes = {name: weight.numel() for name, weight in run.weights.items()}

    def change(names: Sequence[str], moments: dict[str, Moments]) -> NewWeights:
        (name,) = names
        down = run.weights[name].detach()
        gate, up = (name.replace("down_proj", other) for other in ("gate_proj", "up_proj"))
        if stage.compensate:
            problem = quadratic.damped(_hessian(moments[name]), stage.damping)
            wanted = quadratic.target(down, moments[name], problem)
            kept = structured.choose_channels(wanted, problem, keep)
            narrow = structured.refit(wanted, problem, kept)
        else:
            score = scores.channel(down, moments[name].square.sqrt())
            kept = masks.per_layer(score, width - keep).nonzero().flatten()
            narrow = down[:, kept]
        return {gate: run.weights[gate].detach()[kept], up: run.weights[up].detach()[kept], name: narrow}

    _layer_by_layer_(
        stage,
        run,
        change,
        measured=down_names,
        full=stage.compensate,
        follow_dense=stage.compensate and stage.match == "dense",
        epochs=stage.block_epochs,
    )
    _need(run)[0].config.get_text_config().intermediate_size = keep  # what rebuilds the model from its checkpoint
    return {name: _Drop(stage.ratio, size // width * (width - keep)) for name, size in sizes.items()}


def _reconstruct_(stage: SparseGPT | ADMM, run: _Run, prune: Prune) -> dict[str, _Drop]:
    """Zero weights and move the others so that every linear gives what it should."""
    drops, sensitivity = _drops(stage, run)

    def change(names: Sequence[str], moments: dict[str, Moments]) -> NewWeights:
        problem = quadratic.damped(_hessian(moments[names[0]]), stage.damping)
        return {name: pruned(name, moments[name], problem) for name in names}

    def pruned(name: str, moments: Moments, problem: quadratic.Quadratic) -> Tensor:
        weight = run.weights[name].detach()
        wanted = quadratic.target(weight, moments, problem).masked_fill_(weight == 0, 0)
        count = drops[name].count * pool_size(stage, tuple(weight.shape)) // weight.numel()
        found = prune(wanted, problem, count, sensitivity[name].gradient_square if sensitivity else None)
        return quadratic.refine(found, found != 0, wanted, problem.hessian, stage.refine) if stage.refine else found

    _layer_by_layer_(stage, run, change, follow_dense=stage.match == "dense", epochs=stage.block_epochs)
    return drops


def _layer_by_layer_(
    stage: Wanda | SparseGPT | ADMM | Compact,
    run: _Run,
    change: Change,
    *,
    measured: Sequence[str] | None = None,
    full: bool = True,
    follow_dense: bool = False,
    epochs: int = 0,
) -> None:
    """Measure, change and pass on every decoder layer. measured: the linears that `change` asks about; None: all planned.

    epochs: of block-wise fine-tuning, once all of a layer has changed.
    """
    model, data = _need(run)
    names, done = list(run.weights) if measured is None else measured, 0
    for block in walk_layers(model, data.samples, follow_dense=names if follow_dense else ()):
        finished = data.store.load(f"{stage.method}.{block.name}")
        fit = _fitting(run, block, 0 if finished else epochs)
        if stage.order == "one_shot":
            moments = {} if finished else block.moments(names, full=full)
            new = finished or fit(_merge([change(step, moments) for step in block.steps(names)]))
            block.advance()
            _set_all_(run, new)
        else:
            new = finished or {}
            _set_all_(run, new)
            for step in [] if finished else block.steps(names):
                changed = change(step, block.moments(step, full=full))
                _set_all_(run, changed)
                new = new | changed
            new = fit(new)
            _set_all_(run, new)
            block.advance()
        if not finished:
            data.store.save(f"{stage.method}.{block.name}", {name: run.weights[name] for name in new})
        done += len(new)
        run.progress(done, len(run.weights), block.name)


def _fitting(run: _Run, block: Block, epochs: int) -> Callable[[NewWeights], NewWeights]:
    """What fine-tunes a layer's new weights to what the layer gives now, before it is changed."""
    if not epochs:
        return lambda new: new
    names = [name for name in run.weights if name.startswith(f"{block.name}.")]
    dense = blockwise.outputs(block, {name: run.weights[name].detach().float() for name in names})

    def fit(new: NewWeights) -> NewWeights:
        weights = {name: new.get(name, run.weights[name].detach()).float() for name in names}
        return blockwise.fit_block(block, weights, dense, epochs)

    return fit


def _drops(stage: Wanda | SparseGPT | ADMM, run: _Run) -> tuple[dict[str, _Drop], dict[str, Sensitivity] | None]:
    """How much every layer gives up; and the sensitivities that decided it, where the stage asks for them."""
    if stage.allocation == "uniform":
        pools = {name: pool_size(stage, tuple(weight.shape)) for name, weight in run.weights.items()}
        return {
            name: _Drop(stage.ratio, dropped_count(pools[name], stage.ratio) * (weight.numel() // pools[name]))
            for name, weight in run.weights.items()
        }, None
    measured = _sensitivity(run)

    def importance(name: str) -> Tensor:
        given = measured[name]
        weight = run.weights[name].detach().float()
        return weight.square() * given.input_square * given.gradient_square[:, None]

    sizes = [weight.numel() for weight in run.weights.values()]
    wished = masks.global_counts(lambda: map(importance, run.weights), dropped_count(sum(sizes), stage.ratio))
    counts = sensitivity_counts(wished, sizes, stage.ratio)
    return {name: _Drop(count / size, count) for name, size, count in zip(run.weights, sizes, counts, strict=True)}, measured


def _sensitivity(run: _Run) -> dict[str, Sensitivity]:
    """Measured once on the model as it enters the stage; kept in the store."""
    model, data = _need(run)
    names = list(run.weights)
    saved = data.store.load(_SENSITIVITY)
    if saved is None:
        samples = data.samples[:: max(1, len(data.samples) // SENSITIVITY_SAMPLES)][:SENSITIVITY_SAMPLES]
        found = measure_sensitivity(model, samples, names, lambda *_: None)
        saved = {f"{name}.input_square": item.input_square for name, item in found.items()}
        saved |= {f"{name}.gradient_square": item.gradient_square for name, item in found.items()}
        data.store.save(_SENSITIVITY, saved)
    parts = ("input_square", "gradient_square")
    return {name: Sensitivity(*(saved[f"{name}.{part}"].to(run.weights[name].device) for part in parts)) for name in names}


def _need(run: _Run) -> tuple[GemmaModel, CalibrationData]:
    if run.data is None or run.model is None:
        raise PlanError("a sparsity stage needs calibration data, and the pipeline was given none")
    return cast(GemmaModel, run.model), run.data


def _set_all_(run: _Run, new: NewWeights) -> None:
    """Put new weights in place, on the device and in the dtype of the old; a linear's features follow its shape."""
    for name, value in new.items():
        parameter = run.weights[name]
        parameter.data = value.to(parameter.device, parameter.dtype).contiguous()
        linear = cast(GemmaModel, run.model).get_submodule(name)
        if isinstance(linear, nn.Linear):
            linear.out_features, linear.in_features = value.shape


def _hessian(moments: Moments) -> Tensor:
    if moments.hessian is None:
        raise PlanError("a full Hessian is needed and was not measured")
    return moments.hessian


def _merge(parts: Sequence[NewWeights]) -> NewWeights:
    return {name: value for part in parts for name, value in part.items()}
