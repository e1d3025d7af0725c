"""Calibration data and statistics. Oracles: transformers' own forward with plain hooks, and autograd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import EXAMPLE, chart, fresh_model, processing, shared_model
from torch import Tensor, nn

from gemma_opt import gemma
from gemma_opt.calibration import (
    Moments,
    Sample,
    Store,
    draw_samples,
    measure_sensitivity,
    random_samples,
    sources_identity,
    walk_layers,
)
from gemma_opt.errors import RecipeError
from gemma_opt.evaluation.quiz import data_uri
from gemma_opt.recipe import Calibration
from tests.shapes import small_text_model

LENGTHS = (24, 40, 40)  # beyond the sliding window of 8
PROSE = "The quick brown fox jumps over the lazy dog. " * 200


def token_samples() -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(Sample(torch.randint(3, 128, (1, length), generator=generator)) for length in LENGTHS)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def plain_inputs(model: gemma.GemmaModel, samples: tuple[Sample, ...], name: str) -> Tensor:
    """All inputs of one linear in the model's whole forward, [tokens, in]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[0]))
    for sample in samples:
        model(sample.token_ids)
    handle.remove()
    return torch.cat(seen)


# Statistics


def test_moments_are_those_of_the_whole_forward() -> None:
    model, samples = small_text_model(), token_samples()
    measured = {}
    for block in walk_layers(model, samples):
        names = linears(model)
        assert [len(step) for step in block.steps(names)] == [3, 1, 2, 1]
        measured |= block.moments(names)
        block.advance()
    assert measured.keys() == set(linears(model))
    for name, moments in measured.items():
        x = plain_inputs(model, samples, name)
        assert moments.tokens == len(x) == sum(LENGTHS)
        weighted = x
        if name.endswith(("o_proj", "down_proj")):  # a norm follows: tokens count by the inverse mean square of the output
            weighted = x / model.get_submodule(name)(x).detach().square().mean(dim=1, keepdim=True)
        torch.testing.assert_close(moments.hessian, weighted.T @ x / len(x))
        torch.testing.assert_close(moments.square, x.square().mean(dim=0))
        torch.testing.assert_close(moments.input_norm, x.norm(dim=0))
        assert moments.cross is None


def test_shared_inputs_are_measured_once() -> None:
    model = small_text_model()
    block = next(walk_layers(model, token_samples()))
    moments = block.moments(linears(model))
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert moments[f"{attention}.q_proj"] is moments[f"{attention}.k_proj"] is moments[f"{attention}.v_proj"]
    assert moments[f"{mlp}.gate_proj"] is moments[f"{mlp}.up_proj"] is not moments[f"{mlp}.down_proj"]


def test_the_diagonal_alone_is_the_hessians() -> None:
    model, name = small_text_model(), "model.layers.0.mlp.down_proj"
    block = next(walk_layers(model, token_samples()))
    short, full = block.moments([name], full=False)[name], block.moments([name])[name]
    assert short.hessian is None
    torch.testing.assert_close(short.square, full.square)


def test_later_layers_see_what_was_changed_before_them_and_the_dense_stream_does_not() -> None:
    model, dense, samples = small_text_model(), small_text_model(), token_samples()
    name = "model.layers.1.mlp.up_proj"
    found: dict[str, Moments] = {}
    for block in walk_layers(model, samples, follow_dense=[name]):
        found |= block.moments([name])
        block.layer.get_submodule("mlp.up_proj").weight.data.mul_(0.5)  # type: ignore[union-attr]
        block.advance()
    model.get_submodule(name).weight.data.mul_(2)  # type: ignore[union-attr]
    x, x0 = plain_inputs(model, samples, name), plain_inputs(dense, samples, name)
    torch.testing.assert_close(found[name].hessian, x.T @ x / len(x))
    torch.testing.assert_close(found[name].cross, x0.T @ x / len(x))


def test_pictures_go_through_the_models_own_masks() -> None:
    model = shared_model()
    section = Calibration(source=("charts",), windows=2, window_tokens=256)
    samples = draw_samples(section, processing())
    name = "model.language_model.layers.1.self_attn.o_proj"
    blocks = walk_layers(model, samples)
    next(blocks).advance()
    moments = next(blocks).moments([name], full=False)[name]
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[0]))
    for sample in samples:
        ids = sample.token_ids
        with torch.no_grad():
            model(ids, pixel_values=sample.images, token_type_ids=(ids == model.config.image_token_id).long())
    handle.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(moments.square, x.square().mean(dim=0), rtol=1e-4, atol=1e-5)


def test_the_walk_leaves_the_model_as_it_was() -> None:
    model, samples = small_text_model(), token_samples()
    before = model(samples[0].token_ids).logits
    for block in walk_layers(model, samples):
        block.moments(linears(model))
        block.advance()
    assert torch.equal(model(samples[0].token_ids).logits, before)


def test_sensitivity_is_the_squared_gradient_of_the_summed_loss() -> None:
    model, samples = small_text_model(), token_samples()
    names = linears(model)
    calls: list[tuple[int, int]] = []
    found = measure_sensitivity(model, samples, names, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    for name in (names[0], names[-1]):
        squares: list[Tensor] = []
        for sample in samples:
            shift = torch.zeros(sample.token_ids.shape[1], found[name].gradient_square.numel(), requires_grad=True)
            handle = model.get_submodule(name).register_forward_hook(lambda _, __, output, shift=shift: output + shift)
            ids = sample.token_ids
            nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
            handle.remove()
            assert shift.grad is not None
            squares.append(shift.grad.square())
        torch.testing.assert_close(found[name].gradient_square, torch.cat(squares).mean(dim=0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[name].input_square, plain_inputs(model, samples, name).square().mean(dim=0))
    assert all(parameter.requires_grad for parameter in model.parameters())


# Samples


def section(*source: str, windows: int = 4, window_tokens: int = 32, seed: int = 0) -> Calibration:
    return Calibration(source=source, windows=windows, window_tokens=window_tokens, seed=seed)


def test_text_is_cut_into_windows_that_begin_with_bos(tmp_path: Path) -> None:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE)
    tokenizer = processing().tokenizer
    ids = tokenizer.encode(PROSE, add_special_tokens=False)
    possible = [[tokenizer.bos_token_id, *ids[start : start + 31]] for start in range(0, len(ids) - 30, 31)]
    samples = draw_samples(section(str(file)), processing())
    drawn = [sample.token_ids[0].tolist() for sample in samples]
    assert len(drawn) == 4
    assert all(window in possible for window in drawn)
    again = draw_samples(section(str(file)), processing())
    assert all(torch.equal(one.token_ids, other.token_ids) for one, other in zip(samples, again, strict=True))


def test_sources_give_equal_shares_as_far_as_they_go(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(PROSE)
    (tmp_path / "short.jsonl").write_text('{"text": "one line"}\n\n{"text": "another"}\n')
    samples = draw_samples(section(str(tmp_path / "short.jsonl"), str(tmp_path / "long.txt"), windows=7), processing())
    assert [sample.token_ids.shape[1] == 32 for sample in samples] == [False] * 2 + [True] * 5


def test_lines_hold_pictures_messages_and_answers(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(EXAMPLE.read_bytes())
    lines = [
        {"text": "Which bar is tallest?", "image": "picture.png", "answer": "red"},
        {"text": "Which bar is tallest?", "image": data_uri(chart())},
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": [{"type": "text", "text": "Good day"}]},
            ]
        },
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    samples = draw_samples(section(str(file), windows=3, window_tokens=256), processing())
    assert sorted(sample.images is not None for sample in samples) == [False, True, True]
    texts = [str(processing().tokenizer.decode(sample.token_ids[0])) for sample in samples]
    assert sum(text.endswith("red") for text in texts) == 1
    assert sum(text.endswith("Good day") for text in texts) == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 1: "),
        ("[1]", "is not an object"),
        ('{"txt": "a"}', "unknown fields: txt"),
        ('{"text": ""}', "prompt is empty"),
        ('{"text": "a", "image": "none.png"}', "none.png"),
        ('{"text": "a", "image": "http://example.com/a.png"}', "line 1: "),
        ('{"messages": [{"role": "king", "content": "a"}]}', "role must be"),
        ('{"messages": 1}', "messages must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}', "messages[1].content must be"),
        ('{"messages": [{"role": "user", "content": "a"}], "image": "a.png"}', "unknown fields: image"),
        ('{"text": "a", "answer": 3}', "answer must be a text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(RecipeError) as caught:
        draw_samples(section(str(file), windows=1), processing())
    assert "bad.jsonl line 1: " in str(caught.value)
    assert named in str(caught.value)


def test_a_picture_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "image": data_uri(chart())}))
    with pytest.raises(RecipeError, match="window_tokens is 32"):
        draw_samples(section(str(tmp_path / "a.jsonl"), windows=1), processing())


def test_sources_that_do_not_do_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("Too short.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"the sources hold 0 .*tiny\.txt: 0"):
        draw_samples(section(str(tmp_path / "tiny.txt")), processing())
    with pytest.raises(RecipeError, match="not UTF-8"):
        draw_samples(section(str(tmp_path / "binary.txt")), processing())
    for check in (lambda source: draw_samples(section(source), processing()), lambda source: sources_identity(section(source))):
        with pytest.raises(RecipeError, match=r"there is no file nowhere\.txt"):
            check("nowhere.txt")
    with pytest.raises(RecipeError, match="no vision tower"):
        draw_samples(section("charts"), gemma.Processing(processing().tokenizer, None))


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = sources_identity(section(str(file), "charts"))
    file.write_text("two")
    assert first["charts"] == sources_identity(section("charts"))["charts"]
    assert first[str(file)] != sources_identity(section(str(file)))[str(file)]


# The store


def test_a_store_keeps_tensors_for_its_origin_only(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    store = Store(folder, {"recipe": 1})
    assert not folder.exists()
    store.section("1.").save("layer", {"weight": torch.arange(3.0)})
    again = Store(folder, {"recipe": 1})
    assert again.load("layer") is None
    kept = again.section("1.").load("layer")
    assert kept is not None
    assert torch.equal(kept["weight"], torch.arange(3.0))
    assert Store(folder, {"recipe": 2}).section("1.").load("layer") is None
    assert not folder.exists()


def test_a_damaged_piece_is_made_again_and_a_cleared_store_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path / "work", {})
    store.save("layer", {"weight": torch.ones(1)})
    (tmp_path / "work" / "layer.safetensors").write_bytes(b"half")
    assert store.load("layer") is None
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_a_folder_keeps_nothing() -> None:
    store = Store()
    store.save("layer", {"weight": torch.ones(1)})
    assert store.load("layer") is None


def test_fresh_and_shared_models_are_the_same() -> None:
    assert torch.equal(fresh_model().lm_head.weight, shared_model().lm_head.weight)


def test_random_tokens_are_always_the_same_and_never_a_pictures() -> None:
    drawn = torch.cat([sample.token_ids for sample in random_samples(50, 2, 7)])
    assert torch.equal(drawn, torch.cat([sample.token_ids for sample in random_samples(50, 2, 7)]))
    assert drawn.shape == (4, 256)
    assert (drawn[:, 0] == 2).all()
    assert set(drawn.unique().tolist()) == set(range(50)) - {7}
