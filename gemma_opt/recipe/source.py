"""Where base weights and calibration data come from."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gemma_opt.recipe.section import Section

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # organisation/name


class BaseModelSection(Section):
    """Where the weights come from: a hub id with its pinned revision, or the bundled model's name, a folder, a `.gguf` file."""

    base: str = Field(min_length=1)
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="activations; fp16 overflows in Gemma 3")

    @model_validator(mode="after")
    def _revision_is_for_hub_ids(self) -> BaseModelSection:
        if self.revision and not HUB_ID.fullmatch(self.base):
            raise ValueError(f"a revision pins a hub id (organisation/name), and {self.base!r} is none")
        return self


class Calibration(Section):
    """The data on which methods with `needs_data`, and formats with `measures`, find out what matters.

    source: text files, JSONL files with pictures (`gemma_opt.calibration` describes both), or "charts", the built-in picture
    task; every source gives an equal share of the windows. seed: which windows.
    """

    source: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    windows: int = Field(default=128, ge=1, le=65_536)
    window_tokens: int = Field(default=512, ge=8, le=32_768)
    seed: int = Field(default=0, ge=0)
