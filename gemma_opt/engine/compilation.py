"""Selective torch.compile: only the hot submodules a recipe names, and a report of what that did."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from gemma_opt.gemma import text_layers, vision_tower
from gemma_opt.recipe import Compile

log = logging.getLogger(__name__)

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

    decode: one decode step of the whole text model; mlp: the text MLPs; vision: the SigLIP tower, the only one the fast
    engine asks for. With `on_failure: eager` a region that cannot be compiled runs eagerly; otherwise it is an error.
    """

    def __init__(self, section: Compile) -> None:
        self.section = section
        self.targets = section.targets
        clear_compilation_metrics()
        self._breaks_before = Counter(counters["graph_break"])

    def compile_modules_(self, model: nn.Module) -> None:
        """Wrap the modules behind `mlp` and `vision` in place, on the thread that will run them (torch's settings are its own).

        A text-only model has no vision tower: that target is left out, with a line in the log.
        """
        if "vision" in self.targets and vision_tower(model) is None:
            log.info("the model reads text only: there is no vision tower to compile")
            self.targets = tuple(target for target in self.targets if target != "vision")
        if self.targets:
            torch._dynamo.config.suppress_errors = self.section.on_failure == "eager"
        for target in self.targets:
            for module in _modules_of(model, target):
                module.compile()

    def compile_step(self, step: Callable[_P, _R]) -> Callable[_P, _R]:
        """The decode step, compiled if the recipe says so."""
        return torch.compile(step) if "decode" in self.targets else step

    def report(self) -> CompileReport:
        """What was compiled since this compiler was made."""
        metrics = get_compilation_metrics()
        return CompileReport(
            targets=self.targets,
            graphs=len(metrics),
            seconds=sum(entry.entire_frame_compile_time_s or 0.0 for entry in metrics),
            graph_breaks=dict(Counter(counters["graph_break"]) - self._breaks_before),
            recompilations=tuple(" ".join(entry.recompile_reason.split()) for entry in metrics if entry.recompile_reason),
        )


def save_artifacts(folder: Path) -> None:
    """Write what torch compiled in this process into `folder`, one file for this torch, Triton and device.

    Nothing is written where nothing was compiled.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is not None:
        folder.mkdir(exist_ok=True)
        (folder / _artifact_name()).write_bytes(saved[0])


def load_artifacts(folder: Path) -> bool:
    """Give torch the compiled code a checkpoint brings for exactly this torch, Triton and device; False if it has none.

    The file holds pickles: like the weights' hashes, it is only as trustworthy as the folder's source.
    """
    file = folder / _artifact_name()
    if not file.is_file():
        return False
    return torch.compiler.load_cache_artifacts(file.read_bytes()) is not None


def _artifact_name() -> str:
    triton = metadata.version("triton") if torch.cuda.is_available() else "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^\w.+-]+", "-", f"torch-{torch.__version__}_triton-{triton}_{device}.bin")


def _modules_of(model: nn.Module, target: str) -> list[nn.Module]:
    if target == "mlp":
        return [layer.get_submodule("mlp") for layer in text_layers(model).values()]
    tower = vision_tower(model)
    return [tower] if target == "vision" and tower is not None else []
