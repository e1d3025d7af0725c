"""How far a student's next-token distribution is from its teacher's, with the gradient in closed form.

A vocabulary of 262,144 makes autograd's copies of the logits the largest tensors of the whole training, so each loss gives
its gradient itself, from one softmax. Everything here is KL(teacher ‖ student) at a temperature T, in float32, summed over
positions and times T², which keeps the gradient's size independent of T. Source: Hinton et al. 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-7  # of probability: float32 sums to one no better


@dataclass(frozen=True)
class Loss:
    """value: scalar, the sum over positions; gradient: of it with respect to the student's logits, same shape, float32."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens at each position. tokens: int32 [positions, k]; log_probabilities: float32, same shape,
    of the whole vocabulary's softmax at the temperature of training.
    """

    tokens: Tensor
    log_probabilities: Tensor


def top_k(logits: Tensor, k: int, temperature: float) -> TopK:
    """The k likeliest tokens of logits [positions, vocabulary]."""
    values, tokens = logits.topk(k, dim=-1)
    total = torch.logsumexp(logits.float() / temperature, dim=-1, keepdim=True)
    return TopK(tokens.int(), values.float() / temperature - total)


def full_loss(student: Tensor, teacher: Tensor, temperature: float) -> Loss:
    """KL over the whole vocabulary. Logits [positions, vocabulary]; the gradient is T · (student's − teacher's softmax)."""
    q = torch.log_softmax(student.float() / temperature, dim=-1)
    p = torch.log_softmax(teacher.float() / temperature, dim=-1)
    value = (p.exp() * (p - q)).sum() * temperature**2
    return Loss(value, q.exp_().sub_(p.exp_()).mul_(temperature))


def top_k_loss(student: Tensor, teacher: TopK, temperature: float) -> Loss:
    """KL over the k tokens the teacher likes best and one more outcome, "any other token": a lower bound of the full KL.

    student: logits [positions, vocabulary]. Off the k tokens the gradient is T · q · (1 − p_rest / q_rest): the teacher's
    rest is taken to be spread as the student's is.
    """
    tokens = teacher.tokens.long()
    gradient = torch.softmax(student.float() / temperature, dim=-1)
    p, q = teacher.log_probabilities.exp(), gradient.gather(-1, tokens)
    p_rest, q_rest = (1 - p.sum(dim=-1)).clamp_min(_TINY), (1 - q.sum(dim=-1)).clamp_min(_TINY)
    known = (p * (teacher.log_probabilities - q.clamp_min(_TINY**4).log())).sum()
    value = (known + (p_rest * (p_rest / q_rest).log()).sum()) * temperature**2
    gradient.mul_((1 - p_rest / q_rest)[:, None]).scatter_(-1, tokens, q - p)
    return Loss(value, gradient.mul_(temperature))


@dataclass(frozen=True)
class Vocabulary:
    """The part of a vocabulary that stands for all of it. rows: int64 [n], ascending; weight: [n], how many tokens each is."""

    rows: Tensor
    weight: Tensor

    def place(self, tokens: Tensor) -> Tensor:
        """Where these tokens, which must be among the rows, stand in it."""
        return torch.searchsorted(self.rows, tokens.long()).int()

    def level(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits [positions, n] whose softmax at that temperature is an estimate of the whole vocabulary's: a token that
        stands for w others counts w times in the sum. Float32.
        """
        return logits.float() + temperature * self.weight.log()


def draw_vocabulary(known: Tensor, size: int, count: int, generator: torch.Generator) -> Vocabulary:
    """All `known` tokens, and `count` others drawn from the rest of `size`, each standing for its share of the rest.

    Fewer are drawn where fewer are left. A head over a tenth of the vocabulary costs a tenth. Source: Jean et
    al. 2015, arXiv:1412.2007.
    """
    kept = torch.zeros(size, dtype=torch.bool)
    kept[known.long().cpu()] = True
    rest = (~kept).nonzero().flatten()
    drawn = rest[torch.randperm(len(rest), generator=generator)[:count]]
    weight = torch.ones(size)
    weight[drawn] = len(rest) / max(1, len(drawn))
    kept[drawn] = True
    rows = kept.nonzero().flatten()
    return Vocabulary(rows, weight[rows])


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
    """Squared error of the hidden states relative to the teacher's squared size, mean over layers. Differentiable.

    student, teacher: one tensor [windows, length, width] a layer; counted: bool [windows, length].
    """
    terms = [
        (one[counted].float() - other[counted].float()).square().sum() / other[counted].float().square().sum()
        for one, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()
