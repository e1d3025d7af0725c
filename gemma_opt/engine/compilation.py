"""Selective torch.compile: only the hot submodules a recipe names, and a report of what that did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from gemma_opt.errors import CompileError
from gemma_opt.gemma import GemmaModel
from gemma_opt.recipe import Compile

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class CompileReport:
    """What compilation did until now: graphs built, seconds they took, graph breaks by reason, why graphs were rebuilt."""

    targets: tuple[str, ...]
    graphs: int
    seconds: float
    graph_breaks: dict[str, int]
    recompilations: tuple[str, ...]

    def __str__(self) -> str:
        breaks = sum(self.graph_breaks.values())
        counts = (
            f"{self.graphs} graphs in {self.seconds:.1f} s, {breaks} graph breaks, {len(self.recompilations)} recompilations"
        )
        return f"compiled {', '.join(self.targets)}: {counts}" if self.targets else "nothing compiled"


class SelectiveCompiler:
    """Wraps the submodules that a recipe names; torch compiles each at its first use, the warm-up.

    decode: one decode step of the whole text model; mlp: the text MLPs; vision: the SigLIP tower. With
    `on_failure: eager` a region that cannot be compiled runs eagerly; otherwise it is an error.
    """

    def __init__(self, section: Compile) -> None:
        self.section = section
        clear_compilation_metrics()
        self._breaks_before = Counter(counters["graph_break"])
        if section.targets:
            torch._dynamo.config.suppress_errors = section.on_failure == "eager"

    def compile_modules_(self, model: GemmaModel) -> None:
        """Wrap the modules behind `mlp` and `vision` in place. Raises CompileError (E4001) if the model lacks them."""
        for target in self.section.targets:
            for module in _modules_of(model, target):
                module.compile()

    def compile_step(self, step: Callable[_P, _R]) -> Callable[_P, _R]:
        """The decode step, compiled if the recipe says so."""
        return torch.compile(step) if "decode" in self.section.targets else step

    def report(self) -> CompileReport:
        """What was compiled since this compiler was made."""
        metrics = get_compilation_metrics()
        return CompileReport(
            targets=self.section.targets,
            graphs=len(metrics),
            seconds=sum(entry.entire_frame_compile_time_s or 0.0 for entry in metrics),
            graph_breaks=dict(Counter(counters["graph_break"]) - self._breaks_before),
            recompilations=tuple(" ".join(entry.recompile_reason.split()) for entry in metrics if entry.recompile_reason),
        )


def _modules_of(model: GemmaModel, target: str) -> list[nn.Module]:
    if target == "mlp":
        return [layer.mlp for layer in model.get_decoder().layers]
    if target == "vision":
        tower = getattr(model.model, "vision_tower", None)
        if tower is None:
            raise CompileError("the recipe compiles the vision tower, and this model has none")
        return [tower]
    return []
