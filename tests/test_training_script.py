"""The bundled model's training: a row of many questions must train exactly what single questions will ask."""

from __future__ import annotations

import pytest
import torch
from models import BUNDLED, fresh_model, oracle_inputs, processing
from transformers import AutoTokenizer

import train_small_gemma as training
from gemma_opt.prompt import EncodedPrompt


@pytest.fixture(scope="module")
def rows() -> training.Rows:
    processor = processing().processor
    assert processor is not None
    return training.Rows(processor, seed=0, count=100)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_branch_computes_what_its_question_alone_computes(rows: training.Rows, index: int) -> None:
    """Masks and positions of a packed row against transformers' own, question by question."""
    model, row = fresh_model(), rows[index]
    assert row.pixels is not None
    batch = training.collate([row], model.config)
    labels = batch.pop("labels")
    with torch.inference_mode():
        packed = model(**batch).logits[0]
    end = len(row.prefix)
    for question, answer in row.branches:
        start, end = end, end + len(question) + len(answer)
        alone = EncodedPrompt((*row.prefix, *question, *answer), tuple(row.pixels), 1)
        with torch.inference_mode():
            expected = model(**oracle_inputs(model, alone)).logits[0, len(row.prefix) :]
        torch.testing.assert_close(packed[start:end], expected, rtol=1e-4, atol=1e-4)
        assert labels[0, start + len(question) : end].tolist() == answer
        assert set(labels[0, start : start + len(question)].tolist()) == {training.IGNORED}


def test_rows_do_not_depend_on_the_order_in_which_they_are_drawn(rows: training.Rows) -> None:
    one, other = rows[7], training.Rows(rows.processor, seed=0, count=9)[7]
    assert one.prefix == other.prefix
    assert one.branches == other.branches


def test_the_committed_tokenizer_is_the_scripts() -> None:
    committed = AutoTokenizer.from_pretrained(BUNDLED)
    text = "Which bar is tallest? A café, 3 bars\n\n\n and  two stars.<end_of_turn>\n"
    assert committed.encode(text) == training.build_tokenizer().encode(text)
    assert committed.get_vocab() == training.build_tokenizer().get_vocab()


def test_the_model_has_every_feature_of_the_large_ones() -> None:
    config = fresh_model().config
    text, vision = config.text_config, config.vision_config
    assert set(text.layer_types) == {"sliding_attention", "full_attention"}
    assert text.rope_parameters["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
    assert text.query_pre_attn_scalar != text.head_dim
    assert text.num_key_value_heads < text.num_attention_heads
    assert (vision.image_size // vision.patch_size) ** 2 > config.mm_tokens_per_image  # patches are really pooled
    assert sum(path.stat().st_size for path in BUNDLED.glob("*.safetensors")) <= 16 * 10**6
