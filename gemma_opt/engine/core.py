"""The fast engine: continuous batching over the own Gemma 3 forward. Its door; what happens behind it is `runner`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemma_opt.engine.compilation import CompileReport, SelectiveCompiler
from gemma_opt.engine.interface import EngineRequest
from gemma_opt.engine.queueing import EngineThread, HeldGeneration, warm_up
from gemma_opt.engine.runner import Counters, Runner
from gemma_opt.gemma import GemmaModel
from gemma_opt.recipe import Compile, EngineSection


class FastEngine:
    """An `Engine` over a transformers model whose text layers it packs for itself.

    load: builds the model; called on the engine's thread, which keeps it. See `EngineThread` for failures.
    warm_up_request: answered before the constructor returns, without a time limit: it pays for compilation.
    keep_layers: leave transformers' text layers usable, for evaluation; otherwise they are emptied as they are packed.
    compile_cache: a checkpoint's folder of that name; what it has for this device is used.
    run_ahead: start the next decode step before a step's tokens are read; by default where a GPU would have to wait.
    """

    def __init__(
        self,
        load: Callable[[], GemmaModel],
        settings: EngineSection,
        compile_section: Compile,
        warm_up_request: Callable[[], EngineRequest] | None = None,
        *,
        keep_layers: bool = False,
        compile_cache: Path | None = None,
        run_ahead: bool | None = None,
    ) -> None:
        self.counters = Counters()
        # `decode` names what this engine has in any case: its own step instead of a compiled one.
        modules = tuple(target for target in compile_section.targets if target == "vision")
        self._compiler = SelectiveCompiler(compile_section.model_copy(update={"targets": modules}))

        def start() -> Runner:
            runner = Runner(
                load(), settings, self._compiler, self.counters,
                keep_layers=keep_layers, compile_cache=compile_cache, run_ahead=run_ahead,
            )  # fmt: skip
            if warm_up_request:
                warm_up(runner, warm_up_request())
            return runner

        self._thread = EngineThread(start, settings)

    def submit(self, request: EngineRequest) -> HeldGeneration:
        """Queue a request. Raises PromptTooLong, QueueFull, EngineClosed."""
        _ = request.image_keys  # hashed here, on the caller's thread, and kept by the request
        return self._thread.submit(request)

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._thread.alive

    @property
    def compile_report(self) -> CompileReport:
        """What torch.compile did until now."""
        return self._compiler.report()

    def close(self) -> None:
        """Stop serving."""
        self._thread.close()
