"""Questions about pictures, asked through the service exactly as a client would ask them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass

from PIL import Image

from gemma_opt import charts
from gemma_opt.service import Request, Service

LONGEST_ANSWER = 8  # tokens; one word, and room to be wrong


@dataclass(frozen=True)
class QuizScore:
    """Share of exact one-word answers, in [0, 1]. chance: what always giving the most frequent answer would score.

    Kinds of question are those of `charts.ONE_WORD_KINDS`. blank: the pictures were replaced by white ones.
    """

    questions: int
    seed: int
    blank: bool
    accuracy: float
    chance: float
    by_kind: dict[str, float]

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return asdict(self)


def run_quiz(
    service: Service, count: int, seed: int, *, blank: bool = False, progress: Callable[[int, int], None] | None = None
) -> QuizScore:
    """Ask `count` questions about unseen pictures, greedily. Raises what the service raises."""
    asked: list[charts.Question] = []
    right: dict[str, list[bool]] = {}
    for number, (image, question) in enumerate(charts.quiz("test", seed, count), start=1):
        shown = charts.blank(image) if blank else image
        request = Request(prompt=question.text, image=data_uri(shown), temperature=0.0, max_new_tokens=LONGEST_ANSWER)
        reply = "".join(service.stream(request))
        right.setdefault(question.kind, []).append(charts.is_exact(reply, question.answer))
        asked.append(question)
        if progress:
            progress(number, count)
    return QuizScore(
        questions=count,
        seed=seed,
        blank=blank,
        accuracy=sum(map(sum, right.values())) / count,
        chance=charts.chance_level(asked),
        by_kind={kind: sum(answers) / len(answers) for kind, answers in right.items()},
    )


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG data URI, the form in which clients send files."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
