"""Distillation. Oracles: torch's own KL and autograd, a plain training loop, and an undisturbed run."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from models import BUNDLED, fresh_model, processing, shared_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma3ForCausalLM

from gemma_opt import checkpoint, gemma, loading, pipeline
from gemma_opt.build import build
from gemma_opt.calibration import Sample, Store, draw_samples
from gemma_opt.distill import DistillData
from gemma_opt.distill.batches import collate, counted_positions, windows_of_step
from gemma_opt.distill.losses import draw_vocabulary, full_loss, hidden_loss, top_k, top_k_loss
from gemma_opt.distill.rounding import rounded
from gemma_opt.distill.training import learning_rate, phases, trained_parameters
from gemma_opt.errors import BaseModelError, NeedsBuild, PlanError, RecipeError, WeightsError
from gemma_opt.policy import dropped_count
from gemma_opt.recipe import Distill, Recipe
from tests.shapes import small_text_model

EXACT = {"default": "fp32", "roles": {"embedding": "fp32"}}
SECTION = {"data": ["unused"], "steps": 6, "batch": 4, "micro_batch": 2, "top_k": 32, "precision": "float32"}
MAGNITUDE = {"method": "magnitude", "ratio": 0.5}
GRADUAL = {"method": "gradual", "ratio": 0.5, "schedule": {"kind": "cubic", "steps": 3}}


def samples(count: int = 8, length: int = 24) -> tuple[Sample, ...]:
    """Random tokens, every window a little longer than the one before."""
    generator = torch.Generator().manual_seed(3)
    return tuple(Sample(torch.randint(3, 128, (1, length + number), generator=generator)) for number in range(count))


def rules(*stages: Mapping[str, object], dtype: str = "float32", **section: object) -> Recipe:
    tree = {
        "name": "test",
        "model": {"base": "small-gemma3", "dtype": dtype},
        "sparsity": [dict(stage) for stage in stages],
        "distill": SECTION | section,
        "quantization": EXACT if dtype == "float32" else {},
    }
    return Recipe.from_tree(tree, "test")


def trained(recipe: Recipe, data: DistillData | None = None, model: Gemma3ForCausalLM | None = None) -> Gemma3ForCausalLM:
    model = model or small_text_model()
    pipeline.compress(model, recipe, distill_data=data or DistillData(samples(), Store()))
    return model


def mean_kl(student: gemma.GemmaModel, teacher: gemma.GemmaModel) -> float:
    """KL of whole distributions over the samples, by torch, in nats a position."""
    with torch.no_grad():
        pairs = [(student(item.token_ids).logits[0], teacher(item.token_ids).logits[0]) for item in samples()]
    one, other = (torch.cat(parts).log_softmax(-1) for parts in zip(*pairs, strict=True))
    return float(functional.kl_div(one, other, log_target=True, reduction="sum")) / len(one)


# Losses


def logits(seed: int) -> Tensor:
    return torch.randn(5, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_full_loss_is_torchs_kl_with_its_gradient(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    one, other = ((tensor / temperature).log_softmax(-1) for tensor in (student, teacher))
    expected = functional.kl_div(one, other, log_target=True, reduction="sum") * temperature**2
    expected.backward()
    found = full_loss(student.detach(), teacher, temperature)
    torch.testing.assert_close(found.value, expected.detach().float())
    torch.testing.assert_close(found.gradient, student.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 7, 39])
def test_the_top_k_loss_is_the_kl_of_k_tokens_and_the_rest(k: int, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    likeliest = teacher.topk(k).indices
    one, other = ((tensor / temperature).softmax(-1) for tensor in (student, teacher))
    q, p = (
        torch.cat([tensor.gather(-1, likeliest), 1 - tensor.gather(-1, likeliest).sum(-1, keepdim=True)], dim=-1)
        for tensor in (one, other)
    )
    expected = (p * (p / q).log()).sum() * temperature**2
    expected.backward()
    found = top_k_loss(student.detach(), top_k(teacher, k, temperature), temperature)
    torch.testing.assert_close(found.value, expected.detach().float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.gradient, student.grad.float(), rtol=1e-3, atol=1e-4)
    assert found.value <= full_loss(student.detach(), teacher, temperature).value + 1e-4
    if k == 39:  # the rest is one token: nothing is left out
        torch.testing.assert_close(found.value, full_loss(student.detach(), teacher, temperature).value, rtol=1e-4, atol=1e-4)


def test_drawn_tokens_stand_for_all_others() -> None:
    """The sum over the vocabulary is right on the average of many draws, and exactly where everything is drawn."""
    student, known = logits(0).float(), torch.tensor([[3, 9], [9, 30]])
    whole = (student / 2).logsumexp(-1)
    sums: list[Tensor] = []
    for seed in range(400):
        drawn = draw_vocabulary(known, 40, 8, torch.Generator().manual_seed(seed))
        assert len(drawn.rows) == 11
        assert set(drawn.rows.tolist()) >= {3, 9, 30}
        assert drawn.weight.sum() == pytest.approx(40)
        assert (drawn.weight[drawn.place(known).long()] == 1).all()
        sums.append((drawn.level(student[:, drawn.rows], 2.0) / 2).exp().sum(-1))
    torch.testing.assert_close(torch.stack(sums).mean(0).log(), whole, rtol=0, atol=0.05)
    every = draw_vocabulary(known, 40, 1000, torch.Generator())
    assert every.rows.tolist() == list(range(40))
    torch.testing.assert_close((every.level(student, 2.0) / 2).logsumexp(-1), whole)


def test_a_certain_student_and_a_certain_teacher_give_finite_losses() -> None:
    student, teacher = torch.tensor([[500.0, 0, 0], [0, 500.0, 0]]), torch.tensor([[0, 0, 500.0], [0, 500.0, 0]])
    for found in (full_loss(student, teacher, 1.0), top_k_loss(student, top_k(teacher, 1, 1.0), 1.0)):
        assert found.value.isfinite()
        assert found.gradient.isfinite().all()
        assert found.gradient[1].abs().max() < 1e-6


def test_the_hidden_loss_is_relative_and_counts_only_what_is_counted() -> None:
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    student = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]])
    counted = torch.tensor([[True, True, False]])
    assert float(hidden_loss((student, teacher), (teacher, teacher), counted)) == pytest.approx(1 / 26 / 2)


# The data's order


def test_every_window_is_seen_once_before_one_is_seen_again() -> None:
    seen = [window for step in range(6) for window in windows_of_step(step, 3, 9, seed=5)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9))
    assert seen[:9] != seen[9:]
    assert windows_of_step(4, 3, 9, seed=5) == seen[12:15]  # of no state but the step's number
    assert windows_of_step(0, 3, 9, seed=6) != seen[:3]
    assert len(windows_of_step(0, 20, 9, seed=5)) == 20  # a batch may be larger than the data


def test_answers_are_counted_with_their_end_and_pictures_never() -> None:
    ids = torch.tensor([[2, 7, 7, 7, 5, 6, 8]])
    assert counted_positions(Sample(ids), image_token=7).tolist() == [True, False, False, False, True, True, True]
    answered = counted_positions(Sample(ids, answer_tokens=2), image_token=7)
    assert answered.tolist() == [False, False, False, False, True, True, True]  # what predicts 6, 8, and what comes next


def test_a_chart_counts_its_answer() -> None:
    section = Distill(data=("charts",), steps=1, windows=6)
    for sample in draw_samples(section.calibration, processing()):
        assert sample.answer_tokens
        answer = processing().tokenizer.decode(sample.token_ids[0, -sample.answer_tokens :])
        assert "<start_of_turn>" not in answer
        assert "model\n" in processing().tokenizer.decode(sample.token_ids[0, : -sample.answer_tokens])[-8:]


def test_padding_changes_no_prediction() -> None:
    model = shared_model()
    section = Distill(data=("charts",), steps=1, windows=5)
    given = [*draw_samples(section.calibration, processing()), Sample(torch.arange(300, 340)[None])]
    batch = collate(given, range(6), model.config.image_token_id, model.lm_head.weight)
    with torch.no_grad():
        together = model.model(**batch.inputs).last_hidden_state
        for row, sample in enumerate(given):
            ids = sample.token_ids
            pictures = {} if sample.images is None else {"pixel_values": sample.images}
            token_types = (ids == model.config.image_token_id).long()
            alone = model.model(input_ids=ids, token_type_ids=token_types, **pictures).last_hidden_state[0]
            torch.testing.assert_close(together[row, : ids.shape[1]], alone, rtol=1e-3, atol=1e-4)
            assert not batch.counted[row, ids.shape[1] :].any()


# Training


@pytest.mark.parametrize("roles", [["down", "norm"], ["query", "embedding"]], ids=str)
@pytest.mark.parametrize("teacher_section", [{"top_k": 0}, {"top_k": 127}, {"top_k": 127, "negatives": 127}], ids=str)
def test_a_step_is_the_plain_loops(roles: list[str], teacher_section: dict[str, object]) -> None:
    """Slices of logits, gradients in closed form, kept teachers and drawn tokens change nothing but the memory."""
    recipe = rules(MAGNITUDE | {"roles": ["up"]}, roles=roles, **teacher_section, steps=1, batch=4, micro_batch=3)
    model = trained(recipe)
    expected = small_text_model()
    teacher = copy.deepcopy(expected)
    pipeline.compress(expected, Recipe.from_tree(rules(MAGNITUDE | {"roles": ["up"]}).model_dump(exclude={"distill"}), "x"))
    expected.requires_grad_(False)
    parameters = trained_parameters(expected, recipe.distill)
    for parameter in parameters.values():
        parameter.requires_grad_()
    adam = torch.optim.AdamW(parameters.values(), lr=recipe.distill.learning_rate, betas=(0.9, 0.98), weight_decay=0)
    terms, count = torch.zeros(()), 0
    for window in windows_of_step(0, 4, 8, recipe.distill.seed):
        ids = samples()[window].token_ids
        with torch.no_grad():
            wanted = teacher(ids).logits[0].log_softmax(-1)
        terms = terms + functional.kl_div(expected(ids).logits[0].log_softmax(-1), wanted, log_target=True, reduction="sum")
        count += len(wanted)
    (terms / count).backward()
    nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
    adam.step()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("section", [{}, {"top_k": 0, "hidden": 0.5}, {"precision": "bfloat16", "temperature": 2.0}], ids=str)
def test_training_wins_back_what_pruning_lost(section: dict[str, object]) -> None:
    dense, pruned = small_text_model(), small_text_model()
    pipeline.compress(pruned, Recipe.from_tree(rules(MAGNITUDE).model_dump(exclude={"distill"}), "test"))
    recovered = trained(rules(MAGNITUDE, steps=60, learning_rate=0.005, **section))
    assert mean_kl(recovered, dense) < 0.4 * mean_kl(pruned, dense)
    for name, weight in pruned.named_parameters():
        if weight.ndim == 2 and "proj" in name:
            zero = weight == 0
            assert int(zero.sum()) == weight.numel() // 2
            assert (recovered.get_parameter(name)[zero] == 0).all(), name
            assert (recovered.get_parameter(name)[~zero] != 0).all(), name


def test_only_the_named_roles_move_and_everything_else_is_as_it_was() -> None:
    model = small_text_model()
    model.lm_head.weight.requires_grad_(False)
    trained(rules(MAGNITUDE | {"roles": ["up"]}, roles=["gate", "norm"], top_k=0), model=model)
    for name, parameter in model.named_parameters():
        named = "gate_proj" in name or "norm" in name or "up_proj" in name
        assert torch.equal(parameter, small_text_model().get_parameter(name)) != named, name
        assert parameter.requires_grad == (parameter is not model.lm_head.weight)
        assert parameter.grad is None


def test_norms_of_the_vision_tower_are_not_the_decoders() -> None:
    names = trained_parameters(shared_model(), Distill(data=("charts",), steps=1, roles=("norm", "vision")))
    norms = [name for name in names if "norm" in name]
    assert len(norms) == 4 * 6 + 1
    assert all("language_model" in name for name in norms)
    assert any("vision_tower" in name for name in names)
    assert not any("projector" in name for name in names)


def test_a_bfloat16_model_trains_in_float32_and_stays_bfloat16() -> None:
    model = small_text_model().to(torch.bfloat16)
    trained(rules(dtype="bfloat16", precision="bfloat16", learning_rate=0.001, top_k=0), model=model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_kept_teacher_with_every_token_is_the_running_one() -> None:
    one, other = (trained(rules(MAGNITUDE, top_k=k)) for k in (127, 0))
    for (name, parameter), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-3, atol=1e-5, msg=name)


def test_another_model_teaches() -> None:
    teacher = small_text_model(seed=1)
    student = trained(rules(steps=80, learning_rate=0.01), DistillData(samples(), Store(), lambda: teacher))
    assert mean_kl(student, teacher) < 0.5 * mean_kl(small_text_model(), teacher)


def test_a_teacher_that_does_not_fit_is_refused_with_every_reason() -> None:
    teacher = small_text_model()
    teacher.config.vocab_size, teacher.config.hidden_size = 4096, 64
    with pytest.raises(PlanError) as caught:
        trained(rules(top_k=0, hidden=1.0), DistillData(samples(), Store(), lambda: teacher))
    assert "its vocabulary has 4,096 tokens, the student's 128" in str(caught.value)
    assert "it has (2, 64) layers and width, the student (2, 32)" in str(caught.value)


def test_a_text_teacher_is_refused_for_pictures() -> None:
    section = {"data": ["charts"], "windows": 2, "steps": 1}
    drawn = draw_samples(Distill(**section).calibration, processing())
    with pytest.raises(PlanError, match="it sees no pictures"):
        trained(rules(**section), DistillData(drawn, Store(), small_text_model), fresh_model())


def test_a_training_that_diverges_is_an_error() -> None:
    with pytest.raises(WeightsError, match="lower learning_rate"):
        trained(rules(MAGNITUDE, learning_rate=1.0, steps=50, weight_decay=1.0, roles=["norm"], top_k=0), model=broken_model())


def broken_model() -> Gemma3ForCausalLM:
    """Finite weights with outputs that are not."""
    model = small_text_model()
    model.model.norm.weight.data.fill_(1e38)
    return model


# Behind the quantizer's rounding


INT4 = {"format": "int4", "group": 32, "method": "rtn", "smooth": None}


def int4_rules(*, quantized: bool, **section: object) -> Recipe:
    tree = rules(MAGNITUDE | {"ratio": 0.3, "roles": ["up"]}, **section).model_dump(mode="json", exclude_none=True)
    tree["quantization"] = {"default": "fp32", "roles": dict.fromkeys(["query", "gate", "up"], INT4) | {"embedding": "fp32"}}
    tree["distill"]["quantized"] = quantized
    return Recipe.from_tree(tree, "test")


def test_training_behind_the_rounding_makes_a_better_quantized_model() -> None:
    section = {"steps": 80, "learning_rate": 0.001, "roles": ["query", "gate", "up"]}
    dense = small_text_model()
    aware, blind = (trained(int4_rules(quantized=flag, **section)) for flag in (True, False))
    assert mean_kl(aware, dense) < 0.75 * mean_kl(blind, dense)
    up = aware.get_submodule("model.layers.0.mlp.up_proj").dequantize()
    assert int((up == 0).sum()) >= dropped_count(up.numel(), 0.3)


def test_the_student_computes_with_the_weights_the_quantizer_will_store() -> None:
    losses: list[float] = []

    def note(title: str, done: int, total: int) -> None:
        if "loss" in title:
            losses.append(float(title.rpartition(" ")[2]))

    def quantized_kl(recipe: Recipe) -> float:
        model = small_text_model()
        pipeline.compress(model, recipe, note, None, DistillData(samples(), Store()))
        return mean_kl(model, small_text_model())

    recipe = int4_rules(steps=1, batch=8, micro_batch=3, learning_rate=1e-9, top_k=0, quantized=True)
    assert quantized_kl(recipe) == pytest.approx(losses[0], abs=6e-5)  # the loss before the step is the quantized model's


def test_after_training_linears_are_what_they_were() -> None:
    model = small_text_model()
    linear = cast(nn.Linear, model.get_submodule("model.layers.0.mlp.up_proj"))
    with rounded(model, {"model.layers.0.mlp.up_proj": torch.zeros_like}):
        assert not linear(torch.ones(1, 32)).any()
        linear(torch.ones(1, 32)).sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones_like(linear.weight))  # as if there were no rounding
    assert linear(torch.ones(1, 32)).any()
    with pytest.raises(PlanError, match="not a linear"), rounded(model, {"model.norm": torch.zeros_like}):
        pass


# Gradual pruning


def test_steps_are_shared_among_phases_and_the_rate_rises_and_falls() -> None:
    drawn = phases(Distill(data=("x",), steps=20), 3)
    assert [(phase.first, phase.steps) for phase in drawn] == [(0, 6), (6, 6), (12, 8)]
    rates = [learning_rate(done, 100, 1.0) for done in range(100)]
    assert rates[:11] == pytest.approx([*(0.1 * step for step in range(1, 11)), 1.0])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(0, 1, 1.0) == 1.0


@pytest.mark.parametrize("pattern", ["per_layer", "per_row"])
def test_gradual_pruning_with_recovery_reaches_the_ratio_exactly(pattern: str) -> None:
    stage = GRADUAL | {"pattern": pattern, "ratio": 0.37}
    seen: list[str] = []
    model = small_text_model()
    data = DistillData(samples(), Store())
    pipeline.compress(model, rules(stage, steps=10), lambda title, *_: seen.append(title.partition(" · ")[0]), None, data)
    order = [title for title, before in zip(seen, ["", *seen], strict=False) if title != before]
    pruning = "sparsify 1/1 (gradual)"
    assert order == ["teacher", pruning, "distill 1/3", pruning, "distill 2/3", pruning, "distill 3/3", "quantize"]
    one_shot = small_text_model()
    pipeline.compress(one_shot, Recipe.from_tree(rules(stage).model_dump(exclude={"distill"}), "test"))
    moved = 0
    for name, weight in model.named_parameters():
        if "proj" in name:
            zeros = (weight == 0).sum(dim=1) if pattern == "per_row" else (weight == 0).sum()
            size = weight.shape[1] if pattern == "per_row" else weight.numel()
            assert (zeros == dropped_count(size, 0.37)).all(), name
            moved += int(((one_shot.get_parameter(name) == 0) != (weight == 0)).sum())
    assert moved  # what was learned in between changes what falls next


# A kill in the middle


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", ["teacher", "distill 1/3", "distill 2/3", "distill 3/3"])
def test_a_training_goes_on_after_a_kill_with_the_same_result(at: str, tmp_path: Path) -> None:
    recipe, many = rules(GRADUAL, steps=10), samples(40)
    whole = trained(recipe, DistillData(many, Store()))
    steps: list[tuple[str, int]] = []

    def kill(title: str, done: int, total: int) -> None:
        if title.partition(" · ")[0] == at and done == (34 if at == "teacher" else 2):
            raise Killed

    def note(title: str, done: int, total: int) -> None:
        steps.append((title.partition(" · ")[0], done))

    data = DistillData(many, Store(tmp_path / "work", {"x": 1}), save_every_s=0)
    with pytest.raises(Killed):
        pipeline.compress(small_text_model(), recipe, kill, None, data)
    resumed = small_text_model()
    data = DistillData(many, Store(tmp_path / "work", {"x": 1}), save_every_s=1000)
    pipeline.compress(resumed, recipe, note, None, data)
    first = next(done for title, done in steps if title == at)
    assert first == (34 if at == "teacher" else 3)  # only what was lost is done again
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not list((tmp_path / "work").glob("*.state.safetensors"))


# Recipes and builds


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"data": []}, "distill.data"),
        ({"steps": 0}, "distill.steps"),
        ({"temperature": 0}, "distill.temperature"),
        ({"hidden": 1.0}, "`hidden` needs top_k: 0"),
        ({"negatives": 10, "top_k": 0}, "`negatives` stand beside a teacher's top_k"),
        ({"roles": ["head"]}, "distill.roles.0"),
        ({"teacher": "google/gemma-3-4b-it", "revision": "x"}, "distill.revision: unknown key"),
        ({"teacher": {"base": "folder", "revision": "0" * 40}}, "a revision pins a hub id"),
    ],
    ids=str,
)
def test_sections_that_cannot_be_are_refused(section: dict[str, object], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rules(**section)
    assert named in str(caught.value)


def test_steps_and_precision_must_fit_the_rest_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="2 steps for 3 phases"):
        rules(GRADUAL, steps=2)
    with pytest.raises(RecipeError, match=r"needs model\.dtype float32"):
        rules(dtype="bfloat16")
    with pytest.raises(RecipeError, match="float formats only"):
        rules(quantized=True)
    tree = int4_rules(quantized=True).model_dump(mode="json")
    with pytest.raises(RecipeError, match=r"int4 g32 measure their inputs: set `smooth: null`"):
        Recipe.from_tree(tree, "test", ("quantization.roles.up.method=hqq",))


def test_what_is_learned_is_part_of_the_digest_and_unread_calibration_is_not() -> None:
    recipe = rules()
    assert recipe.digest() != rules(steps=7).digest()
    unread = recipe.model_dump(mode="json", exclude_none=True) | {"calibration": {"source": ["x"]}}
    assert Recipe.from_tree(unread, "test").digest() == recipe.digest()


def test_a_teacher_can_be_named_or_described() -> None:
    assert rules().distill.teacher == "base"
    assert rules(teacher="small-gemma3").distill.teacher.base == "small-gemma3"
    assert rules(teacher={"base": "a/b", "revision": "0" * 40}).distill.teacher.revision == "0" * 40


def test_data_is_read_at_build_time_only() -> None:
    for attempt in (
        lambda: pipeline.compress(small_text_model(), rules()),
        lambda: loading.open_model(loading.Source(rules()), "cpu"),
    ):
        with pytest.raises(NeedsBuild, match=r"E2011 .*python -m gemma_opt compress"):
            attempt()


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    processing().save(tmp_path)
    shutil.copy(BUNDLED / "config.json", tmp_path)
    files = gemma.BaseFiles("other", tmp_path)
    gemma.refuse_other_tokenizer(files, processing())
    tree = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), "utf-8")
    with pytest.raises(BaseModelError, match=r"E3001 other has another tokenizer than the student, e\.g\. '[ab]'"):
        gemma.refuse_other_tokenizer(files, processing())


@pytest.mark.slow
def test_a_build_distils_from_another_model_and_leaves_no_work_behind(tmp_path: Path) -> None:
    overrides = (
        "name=test", "quantization.default=int8", "sparsity=[{method: gradual, ratio: 0.3, schedule: {steps: 2}}]",
        "distill={teacher: small-gemma3, data: [charts], windows: 8, steps: 4, batch: 4, learning_rate: 0.0001}",
    )  # fmt: skip
    report = build(Recipe.load("small-int8", overrides), tmp_path / "out", questions=0, device="cpu")
    manifest = checkpoint.read_manifest(tmp_path / "out")
    assert manifest.base["distill"] == {"charts": "charts"}
    assert manifest.base["teacher"]["name"] == "small-gemma3"
    assert report.sparsity == pytest.approx(0.3, abs=0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
