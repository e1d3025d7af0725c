"""Calibration text that the model writes itself. Oracle: the model's own distribution, by transformers' forward."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest
import torch
from models import processing, shared_model
from torch import Tensor

from gemma_opt import checkpoint, gemma
from gemma_opt.build import build
from gemma_opt.calibration import Author, Sample, Store, draw_samples, sources_identity
from gemma_opt.errors import RecipeError
from gemma_opt.recipe import Calibration, Recipe
from gemma_opt.text import control_tokens

OPENING = "<bos><start_of_turn>user\n"
END, TURN = 1, 106


def section(windows: int = 6, tokens: int = 40, seed: int = 0) -> Calibration:
    return Calibration(source=("self",), windows=windows, window_tokens=tokens, seed=seed)


def written(asked: Calibration, author: Author | None = None) -> list[Sample]:
    return list(islice((author or Author(shared_model(), processing())).write(asked), asked.windows))


def pretrained() -> gemma.Processing:
    """The bundled model's tokenizer without its chat template."""
    tokenizer = deepcopy(processing().tokenizer)
    tokenizer.chat_template = None
    return gemma.Processing(tokenizer, None)


def ids_of(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids[0].tolist() for sample in samples]


def test_a_chat_model_writes_questions_and_answers_them() -> None:
    samples = written(section(windows=40))  # more than one batch
    for sample, ids in zip(samples, ids_of(samples), strict=True):
        text = processing().tokenizer.decode(ids)
        assert text.startswith(OPENING)
        assert sample.answer_tokens
        prompt, answer = ids[: -sample.answer_tokens], ids[-sample.answer_tokens :]
        assert processing().tokenizer.decode(prompt).endswith("<end_of_turn>\n<start_of_turn>model\n")
        assert not set(answer) & set(control_tokens(processing().tokenizer).values())
        assert 16 <= len(ids) <= 40
    assert len({tuple(ids) for ids in ids_of(samples)}) > 1


def test_a_pretrained_model_writes_documents() -> None:
    samples = written(section(), Author(shared_model(), pretrained()))
    for ids in ids_of(samples):
        assert ids[0] == processing().tokenizer.bos_token_id
        assert not set(ids[1:]) & set(control_tokens(processing().tokenizer).values())
        assert 16 <= len(ids) <= 40


def test_the_same_section_gives_the_same_text_and_another_seed_another() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = ids_of(written(section()))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    torch.manual_seed(6)
    assert ids_of(written(section())) == first
    assert ids_of(written(section(seed=1))) != first


def test_tokens_come_as_often_as_the_model_expects() -> None:
    """Mean surprise of drawn tokens against the entropy of the distributions they are drawn from, within 4 standard errors."""
    model, processing_ = shared_model(), pretrained()
    controls = set(control_tokens(processing_.tokenizer).values()) - {END, TURN}
    differences: list[Tensor] = []
    for ids in ids_of(written(section(windows=64, tokens=24), Author(model, processing_))):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        logits[:, sorted(controls)] = -torch.inf
        logits[:, [END, TURN]] = -torch.inf  # a text that goes on had none
        log_p = logits.log_softmax(dim=-1)
        entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(dim=-1)
        differences.append(entropy + log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    difference = torch.cat(differences)
    assert abs(difference.mean()) < 4 * difference.std() / len(difference) ** 0.5


def test_a_killed_build_goes_on_with_what_was_written(tmp_path: Path) -> None:
    first = written(section(), Author(shared_model(), processing(), Store(tmp_path / "work")))
    steps: list[tuple[int, int]] = []
    again = written(section(), Author(shared_model(), processing(), Store(tmp_path / "work"), lambda *step: steps.append(step)))
    assert ids_of(again) == ids_of(first)
    assert [sample.answer_tokens for sample in again] == [sample.answer_tokens for sample in first]
    assert not steps


def test_progress_is_told_at_every_token() -> None:
    steps: list[tuple[int, int]] = []
    written(section(windows=1, tokens=24), Author(shared_model(), pretrained(), progress=lambda *step: steps.append(step)))
    assert steps == [(done, 23) for done in range(len(steps))]
    assert len(steps) <= 23


def test_it_is_one_source_among_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    both = Calibration(source=("self", str(tmp_path / "a.txt")), windows=5, window_tokens=32)
    samples = draw_samples(both, processing(), write=Author(shared_model(), processing()).write)
    assert [sample.answer_tokens is not None for sample in samples] == [True, True, True, False, False]
    assert sources_identity(both)["self"] == "self"


def test_a_build_without_data_lets_the_model_write_it(tmp_path: Path) -> None:
    recipe = Recipe.load("small-int8-compact25", ("calibration={source: [self], windows: 4, window_tokens: 40}",))
    stages: list[str] = []
    report = build(recipe, tmp_path / "made", questions=0, progress=lambda stage, *_: stages.append(stage))
    assert stages[0] == "write calibration text"
    assert report.smoke_answer
    assert checkpoint.read_manifest(tmp_path / "made").base["calibration"] == {"self": "self"}
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_who_cannot_write_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="writes no text in windows of 8 tokens"):
        written(section(tokens=8), Author(shared_model(), processing(), Store(tmp_path / "work")))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=r"calibration\.source: .*'self'"):
        draw_samples(section(), processing())
