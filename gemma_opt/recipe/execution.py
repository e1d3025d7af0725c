"""How a model is executed: what is compiled, and how requests are served. Nothing here changes a stored weight."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from gemma_opt.recipe.section import Section


class Compile(Section):
    """Which hot submodules `setup()` compiles, `none` for none. A failed compilation is an error unless the recipe says so.

    vision: the SigLIP tower. decode, or its mlp alone, are for `engine: {kind: reference}`: the fast engine has a decode step
    of its own, which nothing needs to compile. It says so of `decode`, and refuses `mlp`.
    """

    targets: tuple[Literal["decode", "mlp", "vision"], ...] = ()
    on_failure: Literal["error", "eager"] = "error"

    @field_validator("targets", mode="before")
    @classmethod
    def _read_none(cls, value: object) -> object:
        return () if value in ("none", ["none"]) else value

    @model_validator(mode="after")
    def _no_overlap(self) -> Compile:
        if {"decode", "mlp"} <= set(self.targets):
            raise ValueError("'decode' compiles the whole step, MLPs included: name one of decode and mlp")
        return self


class EngineSection(Section):
    """How requests are served: at once, waiting, tokens a slot can hold, wall-clock limit of one reply.

    kind: `reference` is transformers' own decoding, one request at a time. prefill_chunk: tokens of a prompt read between
    two decode steps. lookup: longest guess of speculative decoding by prompt lookup, 0 for none; what is guessed never changes
    a reply (on a GPU a step of an engine that guesses at all may round otherwise than one of an engine that does not).
    """

    kind: Literal["fast", "reference"] = "fast"
    slots: int = Field(default=1, ge=1, le=64)
    queue: int = Field(default=16, ge=0, le=1024)
    context: int = Field(default=8192, ge=16, le=131_072)
    timeout_s: float = Field(default=300.0, gt=0, le=86_400)
    prefill_chunk: int = Field(default=512, ge=16, le=8192)
    lookup: int = Field(default=0, ge=0, le=15)
