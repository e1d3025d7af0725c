"""Train the bundled model: a real Gemma 3 of five million parameters that answers questions about pictures.

    make train                                          # about an hour on 2 cores, minutes on a GPU
    python scripts/train_small_gemma.py --resume        # go on after an interruption

The committed weights are 3000 steps of everything, then 600 with more shapes, which are learnt last (Makefile, `train`).

The architecture is Gemma 3's own with every feature the large checkpoints use: a SigLIP tower whose patches are really
pooled (256 patches → 64 soft tokens), sliding and full attention layers, linear RoPE factor 8 on the full ones, GQA,
QK norms, `query_pre_attn_scalar` ≠ head_dim (as in 27B), a vision MLP whose width no power of two divides (as SigLIP's
4304), a tied embedding, and a byte-fallback BPE tokenizer with Gemma's special tokens at Gemma's ids.

One training row holds one picture and ALL its questions: each question is a branch that sees the shared picture prefix
and itself, at the positions it would have alone. This costs one picture encoding for about eight answers and trains
exactly the single-question distribution (tests/test_training_script.py compares the two forwards).
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from gemma_opt import charts

VOCABULARY = 2048
IMAGE_SIZE = 128
IMAGE_TOKENS = 64
START_OF_TURN, END_OF_TURN = 105, 106  # Gemma 3's ids
IGNORED = -100  # the label that cross entropy skips

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(prefix='', turns=messages) -%}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- set ns.prefix = (system if system is string else system[0].text) + '\\n\\n' -%}
{%- set ns.turns = messages[1:] -%}
{%- endif -%}
{%- for turn in ns.turns -%}
{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\\n' -}}
{{- ns.prefix if loop.first else '' -}}
{%- if turn.content is string -%}
{{- turn.content | trim -}}
{%- else -%}
{%- for part in turn.content -%}
{{- '<start_of_image>' if part.type == 'image' else part.text | trim -}}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\\n' if add_generation_prompt else '' -}}
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You look at pictures.",
    "Answer briefly.",
    "You are a careful reader of charts.",
)

SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good morning."), "Hello! Show me a picture of bars or shapes and ask me about it."),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am a very small Gemma 3. I look at pictures of bars and shapes.",
    ),
    (
        ("What can you do?", "Help", "What can I ask?"),
        "I can tell which bar is tallest, count shapes, name colours and describe the picture.",
    ),
    (("Thank you.", "Thanks", "Thanks!"), "You are welcome."),
    (
        ("Write a poem.", "What is the capital of France?", "Tell me a story.", "What is 2 + 2?"),
        "I only know pictures of bars and shapes.",
    ),
)
NO_PICTURE = "I see no picture. Please send one with your question."


# Model, tokenizer and processor


def build_config() -> Gemma3Config:
    """The shape of the bundled model: 4 text layers of 256 (two sliding, two full), 3 SigLIP layers of 192."""
    text = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=48,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
        max_position_embeddings=8192,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=720,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=VOCABULARY - 3,
        eoi_token_index=VOCABULARY - 2,
        image_token_index=VOCABULARY - 1,
        eos_token_id=[1, END_OF_TURN],
        initializer_range=0.02,
        dtype=torch.bfloat16,
    )


def build_tokenizer() -> GemmaTokenizer:
    """A byte-fallback BPE tokenizer, trained on the task's sentences and on the help texts that Python ships."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", *(f"<unused{n}>" for n in range(99))]
    special += ["<start_of_turn>", "<end_of_turn>"]
    newlines = ["\n" * count for count in range(1, 5)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    head, tail = [*special, *newlines, *bytes_], ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Learned pieces never cross a space or a punctuation mark, as in Gemma's vocabulary.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()]
    )
    printable = ["▁", *(chr(code) for code in range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(head) - len(tail),
        initial_alphabet=printable,
        limit_alphabet=len(printable),
        show_progress=False,
    )
    learner.train_from_iterator(corpus(), trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: index for index, piece in enumerate([*head, *pieces, *tail])}
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        extra_special_tokens={"boi_token": tail[0], "eoi_token": tail[1], "image_token": tail[2]},
    )
    tokenizer.add_tokens(newlines)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}, replace_extra_special_tokens=False
    )
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.chat_template = CHAT_TEMPLATE
    if len(tokenizer) != VOCABULARY or tokenizer.convert_tokens_to_ids("<end_of_turn>") != END_OF_TURN:
        raise RuntimeError(f"the tokenizer has {len(tokenizer)} tokens, {VOCABULARY} were planned")
    return tokenizer


def corpus() -> list[str]:
    """What the tokenizer learns from. Split at line ends: Gemma's tokenizer never merges across them."""
    pictures = [charts.draw("train", 0, index, size=(16, 16)) for index in range(3000)]
    sentences = [text for picture in pictures for question in picture.questions for text in (question.text, question.answer)]
    sentences += [answer for _, answer in SMALL_TALK] + [NO_PICTURE] + list(SYSTEM_PROMPTS)
    manual = [
        line.strip() for topic in sorted(pydoc_data.topics.topics) for line in pydoc_data.topics.topics[topic].splitlines()
    ]
    return sentences + manual


def build_processor(tokenizer: GemmaTokenizer) -> Gemma3Processor:
    """Gemma 3's processor with pictures of 128 × 128 and 64 soft tokens."""
    half = [0.5, 0.5, 0.5]
    pictures = Gemma3ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=half, image_std=half, do_convert_rgb=True,
        pan_and_scan_min_crop_size=64, pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2,
    )  # fmt: skip
    return Gemma3Processor(pictures, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=IMAGE_TOKENS)


def build_model(config: Gemma3Config) -> Gemma3ForConditionalGeneration:
    """An untrained model. transformers starts the projector at zero (it expects trained weights); here it must learn."""
    model = Gemma3ForConditionalGeneration(config).float()
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    return model


# Training rows


@dataclass(frozen=True)
class Row:
    """One picture (or none), the token ids all its questions share, and (question ids, answer ids) per branch."""

    pixels: Tensor | None
    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]


class Rows(Dataset[Row]):
    """Row number i is drawn from (seed, i): shuffling, workers and resuming cannot change what it holds."""

    def __init__(self, processor: Gemma3Processor, seed: int, count: int, more_shapes: float = 0.0) -> None:
        self.processor = processor
        self.more_shapes = more_shapes
        self.tokenizer = processor.tokenizer
        self.seed = seed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        rng = random.Random(f"row/{self.seed}/{index}")
        system = rng.choice(
            (None, SYSTEM_PROMPTS[0], SYSTEM_PROMPTS[0], *SYSTEM_PROMPTS[1:]) if rng.random() < 0.7 else (None,)
        )
        scene = "shapes" if self.more_shapes and rng.random() < self.more_shapes else None
        picture = charts.draw("train", self.seed, index, scene=scene)
        if rng.random() < 0.04:
            return self._row(system, None, self._without_picture(rng, picture))
        return self._row(system, picture.image, [(question.text, question.answer) for question in picture.questions])

    def _without_picture(self, rng: random.Random, picture: charts.Picture) -> list[tuple[str, str]]:
        talk = [(rng.choice(questions), answer) for questions, answer in SMALL_TALK]
        return talk + [(question.text, NO_PICTURE) for question in rng.sample(picture.questions, 2)]

    def _row(self, system: str | None, image: Image.Image | None, pairs: list[tuple[str, str]]) -> Row:
        question = "\0"  # stands for the question while the template is split around it
        content = [{"type": "image"}] if image else []
        turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        turns.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, after = text.split(question)
        if image:
            before = before.replace(self.tokenizer.boi_token, self.processor.full_image_sequence)
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        branches = [(encode(asked + after), encode(answer + "<end_of_turn>")) for asked, answer in pairs]
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"] if image else None
        return Row(pixels, encode(before), branches)


def collate(rows: list[Row], config: Gemma3Config) -> dict[str, Tensor | dict[str, Tensor]]:
    """Rows → model inputs, with 4-D masks in which a branch sees the prefix and itself.

    Returns input_ids, position_ids, labels [batch, length]; attention_mask {layer type: [batch, 1, length, length] bool};
    pixel_values [pictures, 3, side, side] where any row has a picture.
    """
    length = max(len(row.prefix) + sum(len(q) + len(a) for q, a in row.branches) for row in rows)
    shape = (len(rows), length)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    positions, branch = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for number, row in enumerate(rows):
        end = len(row.prefix)
        ids[number, :end] = torch.tensor(row.prefix)
        positions[number, :end] = torch.arange(end)
        branch[number, :end] = 0
        for index, (question, answer) in enumerate(row.branches, start=1):
            start, end = end, end + len(question) + len(answer)
            ids[number, start:end] = torch.tensor(question + answer)
            positions[number, start:end] = torch.arange(len(row.prefix), len(row.prefix) + end - start)
            branch[number, start:end] = index
            labels[number, start + len(question) : end] = torch.tensor(answer)
    is_image = ids == config.image_token_id
    same_branch = (branch[:, :, None] == branch[:, None, :]) | ((branch[:, None, :] == 0) & (branch[:, :, None] > 0))
    distance = positions[:, :, None] - positions[:, None, :]
    seen = same_branch & ((distance >= 0) | (is_image[:, :, None] & is_image[:, None, :]))
    seen |= torch.eye(length, dtype=torch.bool)  # padding attends to itself: an empty softmax row would be NaN
    window = config.text_config.sliding_window
    batch: dict[str, Tensor | dict[str, Tensor]] = {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "attention_mask": {"full_attention": seen[:, None], "sliding_attention": (seen & (distance < window))[:, None]},
    }
    pixels = [row.pixels for row in rows if row.pixels is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


# The run


def main(
    out: Annotated[Path, typer.Option(help="Where the finished model goes.")] = Path("weights_cache/small-gemma3"),
    work: Annotated[Path, typer.Option(help="Checkpoints of the running training.")] = Path("build/small-gemma3"),
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a step; each brings about eight questions.")] = 24,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
    start_from: Annotated[Path | None, typer.Option(help="Trained weights to go on from, with a new schedule.")] = None,
    more_shapes: Annotated[float, typer.Option(min=0, max=1, help="This share of pictures are shapes for certain.")] = 0.0,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --work.")] = False,
) -> None:
    """Train from scratch, save in Hugging Face layout with bf16 weights."""
    set_seed(seed)
    config = build_config()
    processor = build_processor(build_tokenizer())
    checkpoint = get_last_checkpoint(str(work)) if resume else None
    started = checkpoint or start_from
    model = load_partly_trained(str(started)) if started else build_model(config)
    typer.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters", err=True)
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps * 0.05),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=True,  # autocast; the weights stay fp32 while they train
        use_cpu=not torch.cuda.is_available(),
        logging_steps=25,
        save_steps=500,
        save_total_limit=2,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        report_to=[],
        seed=seed,
    )
    rows = Rows(processor, seed, steps * batch, more_shapes)
    trainer = Trainer(model, arguments, data_collator=lambda rows: collate(rows, config), train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    save(model, processor, out)


def load_partly_trained(checkpoint: str) -> Gemma3ForConditionalGeneration:
    """Saved weights, in float32. Of its checkpoints Trainer restores optimizer and schedule, but looks for the weights under
    the modules' names, while transformers saves them under the hub's: it would go on from random weights with a warning.
    """
    return Gemma3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)


def save(model: Gemma3ForConditionalGeneration, processor: Gemma3Processor, out: Path) -> None:
    """Write the bf16 weights, tokenizer, processor and generation config, replacing what was there."""
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=[1, END_OF_TURN], pad_token_id=0)
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.config.text_config.dtype = model.config.vision_config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(staging)
    processor.save_pretrained(staging)
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)


if __name__ == "__main__":
    typer.run(main)
