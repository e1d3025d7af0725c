"""A Gemma 3 that reads text only goes through the same code: the recipes of the sizes that see, built and served."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import fresh_model, processing
from transformers import Gemma3ForCausalLM

from gemma_opt.build import build
from gemma_opt.checkpoint import read_manifest
from gemma_opt.recipe import Recipe


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model without its eyes, as a base folder."""
    sees = fresh_model()
    model = Gemma3ForCausalLM(sees.config.get_text_config())
    model.model.load_state_dict(sees.get_submodule("model.language_model").state_dict())
    model.tie_weights()
    folder = tmp_path_factory.mktemp("text-only")
    model.save_pretrained(folder)
    processing().tokenizer.save_pretrained(folder)
    return folder


def test_a_recipe_of_the_4b_is_built_and_answers(text_only: Path, tmp_path: Path) -> None:
    """It names int8 for vision and compiles the tower: both are left out where there is none."""
    report = build(Recipe.load("gemma-3-4b-int8"), tmp_path / "out", base=str(text_only), device="cpu", questions=0)
    assert report.smoke_answer
    assert {str(row["role"]) for row in read_manifest(report.folder).plan}.isdisjoint({"vision", "projector"})
