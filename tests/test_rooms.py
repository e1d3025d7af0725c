"""The house's one rule: a room imports only from lower tiers, and imports form no circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import gemma_opt

PACKAGE = Path(gemma_opt.__file__).parent
TIERS = {
    0: ("errors", "recipe", "charts", "shapes", "onednn", "staging", "logs"),
    1: ("layout", "policy", "gemma", "fetching", "images", "prompt", "text", "calibration"),
    2: ("sparsity", "lowrank", "distill", "quantization", "inspection", "sizing", "workspace"),
    3: ("pipeline", "checkpoint", "engine"),
    4: ("environment", "identity", "loading", "service", "cancellation", "request_inputs", "evaluation", "export", "serving"),
    5: ("build", "report", "throughput"),
    6: ("terminal", "cli", "__main__"),
}
TIER_OF = {room: tier for tier, rooms in TIERS.items() for room in rooms}
STRANGERS = [("sparsity", "quantization"), ("checkpoint", "pipeline"), ("engine", "checkpoint"), ("engine", "pipeline")]


def imports_of(path: Path) -> set[str]:
    """Dotted names of this package's modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gemma_opt"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("gemma_opt.")}
    return {name.removeprefix("gemma_opt.") for name in names}


def module_graph() -> dict[str, set[str]]:
    """Module → modules it imports."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items() if name != "__init__"}

    def target(name: str) -> str | None:
        return next((known for known in (name, name.rpartition(".")[0]) if known in modules), None)

    return {name: {found for used in imports_of(path) if (found := target(used))} - {name} for name, path in modules.items()}


def test_every_room_has_a_tier() -> None:
    rooms = {name.partition(".")[0] for name in module_graph()}
    assert rooms == TIER_OF.keys() & rooms, f"rooms without a tier: {rooms - TIER_OF.keys()}"


def test_rooms_import_only_from_their_own_or_lower_tiers() -> None:
    upward = [
        f"{name} imports {used}"
        for name, uses in module_graph().items()
        for used in uses
        if TIER_OF[used.partition(".")[0]] > TIER_OF[name.partition(".")[0]]
    ]
    assert not upward, upward


def test_imports_form_no_circle() -> None:
    tuple(graphlib.TopologicalSorter(module_graph()).static_order())  # raises CycleError


def test_rooms_that_must_not_know_each_other() -> None:
    graph = module_graph()
    for one, other in STRANGERS:
        crossing = [
            (name, used)
            for name, uses in graph.items()
            for used in uses
            if {name.partition(".")[0], used.partition(".")[0]} == {one, other}
        ]
        assert not crossing, crossing


def test_predictor_imports_neither_torch_nor_a_model_library() -> None:
    source = ast.parse((PACKAGE.parent / "predict.py").read_text("utf-8"))
    names = {alias.name.partition(".")[0] for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module).partition(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert names == {"sys", "collections", "cog", "gemma_opt"}
