"""Teachers: one that runs beside its student, and one whose likeliest tokens were kept before its student was made.

The kept one costs no memory for a second model and runs once for each window, however often the window is seen; it
must be made while the teacher is still there, that is before the first stage changes the model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from gemma_opt.calibration import Sample, Store
from gemma_opt.distill.batches import Batch, collate
from gemma_opt.distill.losses import Loss, TopK, Vocabulary, draw_vocabulary, full_loss, top_k, top_k_loss
from gemma_opt.errors import PlanError
from gemma_opt.gemma import PICTURE_TOKENS, GemmaModel
from gemma_opt.recipe import Distill

POSITIONS = 128  # whose logits exist at once: 134 MB in float32 for 262,144 tokens
_PIECE = 32  # windows in one file of the store

Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class Seen:
    """What a teacher says about one batch.

    loss: of the student's logits for a slice of the counted positions; rows: of the head that these logits are for, None for
    all; hidden: the teacher's states, None where they are not compared.
    """

    loss: Callable[[Tensor, slice], Loss]
    rows: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


class Teacher(Protocol):
    """Gives the loss of a student's logits."""

    def look(self, batch: Batch) -> Seen:
        """Everything about a batch that does not depend on the student."""
        ...


class RunningTeacher:
    """The teacher as a model of its own, which runs for every batch."""

    def __init__(self, model: GemmaModel, section: Distill) -> None:
        self.model = model.requires_grad_(False)
        self._section = section
        self._table = head_table(model, section)

    @torch.no_grad()
    def look(self, batch: Batch) -> Seen:
        """One forward of the decoder; logits follow slice by slice."""
        output = decoder(self.model)(**batch.inputs, use_cache=False, output_hidden_states=self._section.hidden > 0)
        states = output.last_hidden_state[batch.counted]

        def loss(student: Tensor, positions: slice) -> Loss:
            logits = nn.functional.linear(states[positions].to(self._table.dtype), self._table)
            known = min(student.shape[-1], logits.shape[-1])  # 4B models have 64 tokens more than 1B ones
            found = full_loss(student[:, :known], logits[:, :known], self._section.temperature)
            if known == student.shape[-1]:
                return found
            return Loss(found.value, nn.functional.pad(found.gradient, (0, student.shape[-1] - known)))

        return Seen(loss, None, output.hidden_states if self._section.hidden else None)

    @torch.no_grad()
    def top_k(self, batch: Batch, k: int, vocabulary: int) -> list[TopK]:
        """The likeliest tokens at the counted positions of every window of a batch, of the first `vocabulary` ones."""
        with torch.autocast(batch.counted.device.type, torch.bfloat16, enabled=self._section.precision == "bfloat16"):
            states = decoder(self.model)(**batch.inputs, use_cache=False).last_hidden_state[batch.counted]
        states = states.to(self._table.dtype)
        parts = [
            top_k(nn.functional.linear(piece, self._table[:vocabulary]), k, self._section.temperature)
            for piece in states.split(POSITIONS)
        ]
        lengths = batch.counted.sum(dim=1).tolist()
        tokens = torch.cat([part.tokens for part in parts]).cpu().split(lengths)
        values = torch.cat([part.log_probabilities for part in parts]).cpu().split(lengths)
        return [TopK(*window) for window in zip(tokens, values, strict=True)]


class KeptTeacher:
    """The teacher's likeliest tokens for every window, read back from the store they were written to.

    vocabulary: of the student.
    """

    def __init__(self, kept: Sequence[TopK], section: Distill, vocabulary: int) -> None:
        self._kept = kept
        self._section = section
        self._vocabulary = vocabulary

    def look(self, batch: Batch) -> Seen:
        """The batch's windows put together, in its own order."""
        kept, temperature, device = (
            [self._kept[window] for window in batch.windows],
            self._section.temperature,
            batch.counted.device,
        )
        tokens = torch.cat([window.tokens for window in kept])
        values = torch.cat([window.log_probabilities for window in kept]).to(device)
        if not self._section.negatives:
            tokens = tokens.to(device)
            return Seen(lambda student, at: top_k_loss(student, TopK(tokens[at], values[at]), temperature))
        drawn = draw_vocabulary(tokens, self._vocabulary, self._section.negatives, self._generator(batch))
        placed, part = drawn.place(tokens).to(device), Vocabulary(drawn.rows.to(device), drawn.weight.to(device))

        def loss(student: Tensor, at: slice) -> Loss:
            return top_k_loss(part.level(student, temperature), TopK(placed[at], values[at]), temperature)

        return Seen(loss, part.rows)

    def _generator(self, batch: Batch) -> torch.Generator:
        """Of the batch's windows alone, so that a training that goes on draws what it would have drawn."""
        return torch.Generator().manual_seed(random.Random(f"{self._section.seed}/{batch.windows}").getrandbits(63))


def make_teacher(
    student: GemmaModel,
    load_teacher: Callable[[], GemmaModel] | None,
    section: Distill,
    samples: Sequence[Sample],
    store: Store,
    progress: Progress,
) -> Teacher:
    """The teacher of a section, made while `student` is still uncompressed: where load_teacher is None, that is the teacher.

    Raises PlanError where teacher and student cannot be compared.
    """
    if not section.top_k:
        teacher = load_teacher() if load_teacher else copy.deepcopy(student)
        _refuse_strangers(student, teacher, section, samples)
        return RunningTeacher(teacher, section)
    kept = _read(samples, store)
    if len(kept) < len(samples):
        was_trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        teacher = load_teacher() if load_teacher else student
        _refuse_strangers(student, teacher, section, samples)
        vocabulary = min(model.config.get_text_config().vocab_size for model in (teacher, student))
        kept = _keep(RunningTeacher(teacher, section), kept, section, samples, vocabulary, store, progress)
        for parameter in was_trained:
            parameter.requires_grad_()
    return KeptTeacher(kept, section, student.config.get_text_config().vocab_size)


def decoder(model: GemmaModel) -> nn.Module:
    """The model without its head, pictures included."""
    return cast(nn.Module, model.model)


def head_table(model: GemmaModel, section: Distill) -> Tensor:
    """The head's weight in the precision of products, cast once: autocast would do it for every slice."""
    table = model.lm_head.weight.detach()
    return table.to(torch.bfloat16) if section.precision == "bfloat16" else table


def image_token(model: GemmaModel) -> int:
    """The id of a picture's soft tokens; −1 for a text-only model."""
    return getattr(model.config, "image_token_id", -1)


def _read(samples: Sequence[Sample], store: Store) -> list[TopK]:
    """The windows that are in the store, from the first on."""
    kept: list[TopK] = []
    while len(kept) < len(samples) and (piece := store.load(f"teacher.{len(kept)}")):
        lengths = piece["lengths"].tolist()
        windows = zip(piece["tokens"].split(lengths), piece["values"].split(lengths), strict=True)
        kept += (TopK(*window) for window in windows)
    return kept


def _keep(
    teacher: RunningTeacher,
    kept: list[TopK],
    section: Distill,
    samples: Sequence[Sample],
    vocabulary: int,
    store: Store,
    progress: Progress,
) -> list[TopK]:
    """Add the windows that are missing, in pieces that the store keeps."""
    like, token = cast(Tensor, teacher.model.get_input_embeddings().weight), image_token(teacher.model)
    k = min(section.top_k, vocabulary)
    while len(kept) < len(samples):
        piece: list[TopK] = []
        end = min(len(kept) + _PIECE, len(samples))
        for first in range(len(kept), end, section.micro_batch):
            windows = range(first, min(first + section.micro_batch, end))
            piece += teacher.top_k(collate(samples, windows, token, like), k, vocabulary)
            progress(windows[-1] + 1, len(samples))
        store.save(
            f"teacher.{len(kept)}",
            {
                "tokens": torch.cat([window.tokens for window in piece]),
                "values": torch.cat([window.log_probabilities for window in piece]),
                "lengths": torch.tensor([len(window.tokens) for window in piece]),
            },
        )
        kept = kept + piece
    return kept


def _refuse_strangers(student: GemmaModel, teacher: GemmaModel, section: Distill, samples: Sequence[Sample]) -> None:
    """Every reason why a teacher's answers would mean nothing to the student."""
    one, other = (model.config.get_text_config() for model in (student, teacher))
    problems: list[str] = []
    if abs(one.vocab_size - other.vocab_size) > PICTURE_TOKENS:
        problems.append(f"its vocabulary has {other.vocab_size:,} tokens, the student's {one.vocab_size:,}")
    if any(sample.images is not None for sample in samples) and image_token(teacher) < 0:
        problems.append("it sees no pictures, and the data has some")
    shapes = [(config.num_hidden_layers, config.hidden_size) for config in (one, other)]
    if section.hidden and shapes[0] != shapes[1]:
        problems.append(f"hidden states are compared, and it has {shapes[1]} layers and width, the student {shapes[0]}")
    if problems:
        raise PlanError("distill: the teacher does not fit the student:\n  " + "\n  ".join(problems))
