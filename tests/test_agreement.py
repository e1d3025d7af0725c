"""Agreement with a reference: against KL computed by hand, and on models whose difference is known."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from models import fresh_model, processing

from gemma_opt.errors import UsageError
from gemma_opt.evaluation.agreement import (
    END,
    GREEDY_TOKENS,
    chart_prompts,
    greedy_agreement,
    kl_divergence,
    prefix_match,
    text_agreement,
    text_prompts,
)
from gemma_opt.evaluation.perplexity import text_perplexity
from gemma_opt.evaluation.suite import Measures, evaluate
from gemma_opt.loading import Ready, resolve
from gemma_opt.policy import plan
from gemma_opt.service import Service
from tests.shapes import recipe, small_text_model

TEXT = "A bar chart with three bars: red, blue and green. The tallest bar is red. " * 40


@pytest.fixture(scope="module")
def dense() -> Iterator[Service]:
    running = Service.load(resolve("small-bf16"), "cpu")
    yield running
    running.close()


@pytest.fixture(scope="module")
def int8() -> Iterator[Service]:
    running = Service.load(resolve("small-int8"), "cpu")
    yield running
    running.close()


def disturbed(amount: float) -> Ready:
    """The bundled model with noise on every weight of its first MLP."""
    model, rules = fresh_model(), recipe()
    with torch.no_grad():
        for parameter in model.model.language_model.layers[0].mlp.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return Ready(rules, model, processing(), plan(model, rules))


# KL divergence


def test_kl_is_the_sum_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p ‖ q) = ½ ln 2 + ½ ln (2/3)."""
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[1 / 4, 3 / 4]]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(kl_divergence(q, p)) == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))


def test_kl_against_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    one, other = (5 * torch.randn(7, 11, generator=generator) for _ in range(2))
    for row, found in enumerate(kl_divergence(one, other)):
        p, q = ([math.exp(x) for x in logits[row].tolist()] for logits in (one, other))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        assert float(found) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-4)


def test_kl_ignores_a_shift_of_all_logits_and_is_zero_for_equals() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits + 17).abs().max() < 1e-5


# Texts


def test_a_model_agrees_with_itself() -> None:
    ready = disturbed(0.0)
    found = text_agreement(ready, ready, TEXT, window=64)
    assert found.kl == 0
    assert found.top1 == 1
    assert found.ratio == 1


def test_windows_are_added_up_as_a_naive_loop_does() -> None:
    reference, other, window = disturbed(0.0), disturbed(0.02), 200  # wider than one chunk of rows
    found = text_agreement(reference, other, TEXT, window=window, limit=3)
    ids = reference.processing.tokenizer.encode(TEXT, add_special_tokens=False)
    kl, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for start in (0, 199, 398):
            tokens = torch.tensor([[2, *ids[start : start + 199]]])
            one, two = (torch.log_softmax(ready.model(tokens).logits[0, :-1].double(), -1) for ready in (reference, other))
            kl += float((one.exp() * (one - two)).sum())
            same += int((one.argmax(-1) == two.argmax(-1)).sum())
            count += 199
    assert found.tokens == count
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.top1 == same / count
    assert found.perplexity == pytest.approx(text_perplexity(other, TEXT, window=window, limit=3), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(text_perplexity(reference, TEXT, window=window, limit=3), rel=1e-6)


def test_more_noise_is_less_agreement() -> None:
    reference = disturbed(0.0)
    little, much = (text_agreement(reference, disturbed(amount), TEXT, window=64, limit=4) for amount in (0.003, 0.03))
    assert 0 < little.kl < much.kl
    assert little.top1 > much.top1


def test_another_vocabulary_is_refused() -> None:
    other = small_text_model()
    rules = recipe()
    with pytest.raises(UsageError, match=r"another vocabulary \(2,048 and 128 tokens\)"):
        text_agreement(disturbed(0.0), Ready(rules, other, processing(), plan(other, rules)), TEXT)


# Greedy replies


def test_prefixes_by_hand() -> None:
    found = prefix_match([([1, 2, 3, END], [1, 2, 3, END]), ([1, 2, 3], [1, 9, 3]), ([5], [6, END]), ([7, 8], [7])])
    assert found.prompts == 4
    assert found.tokens == (4 + 1 + 0 + 1) / 4
    assert found.share == (4 + 1 + 0 + 1) / (4 + 3 + 1 + 2)
    assert found.identical == 1 / 4


def test_prefixes_against_a_naive_loop() -> None:
    rng = random.Random(0)
    pairs = [([rng.randint(0, 2) for _ in range(rng.randint(1, 9))], [rng.randint(0, 2) for _ in range(5)]) for _ in range(99)]
    equal = 0
    for one, other in pairs:
        position = 0
        while position < min(len(one), len(other)) and one[position] == other[position]:
            position += 1
        equal += position
    assert prefix_match(pairs).tokens == pytest.approx(equal / 99)


def test_text_prompts_are_spread_over_the_text(dense: Service) -> None:
    prompts = text_prompts(dense.ready, TEXT, 3, window=100)
    assert len(prompts) == 3
    assert all(len(prompt.token_ids) == 64 and prompt.token_ids[0] == 2 for prompt in prompts)
    assert len(text_prompts(dense.ready, TEXT[:1500], 50, window=100)) < 50


def test_no_prompts_are_no_greedy_replies(dense: Service) -> None:
    """The story: `--prompts 0` divided by zero."""
    assert text_prompts(dense.ready, TEXT, 0) == []
    found = evaluate(dense, dense, Measures({"bars": TEXT}, window=64, windows=1, prompts=0), lambda *call: None)
    assert found.greedy is None


def test_int8_keeps_most_greedy_tokens_and_a_model_keeps_all_its_own(dense: Service, int8: Service) -> None:
    prompts = [*chart_prompts(dense, 3, 1), *text_prompts(dense.ready, TEXT, 2, window=100)]
    assert [len(prompt.images) for prompt in prompts] == [1, 1, 1, 0, 0]
    itself = greedy_agreement(dense, dense, prompts)
    assert itself.share == itself.identical == 1
    compressed = greedy_agreement(dense, int8, prompts)
    assert 0 < compressed.tokens <= GREEDY_TOKENS
    assert compressed.share > 0.5


# All together


def test_the_suite_measures_what_it_was_asked(dense: Service, int8: Service) -> None:
    heard: list[tuple[str, int, int]] = []
    measures = Measures({"bars": TEXT}, window=64, charts=4, prompts=2)
    found = evaluate(int8, dense, measures, lambda *call: heard.append(call))
    assert found.charts is not None
    assert found.charts.questions == 4
    assert found.greedy is not None
    assert found.greedy.prompts == 4  # two from the text, two pictures
    assert found.perplexity == {name: one.perplexity for name, one in found.agreement.items()}
    assert found.perplexity.keys() == {"bars", "chart answers"}
    assert {title for title, _, _ in heard} == {"charts", "texts", "greedy replies"}
    alone = evaluate(int8, None, Measures({"bars": TEXT}, window=64), lambda *call: None)
    assert alone.to_json().keys() == {"perplexity"}
    assert alone.perplexity["bars"] == pytest.approx(found.perplexity["bars"], rel=1e-6)
