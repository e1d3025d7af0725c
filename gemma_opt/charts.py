"""Pictures with questions: the task on which the bundled model is trained, calibrated and evaluated.

Every picture is drawn from a seed: a bar chart (2 to 5 coloured bars) or a scatter of coloured shapes (1 to 4).
Each comes with questions whose answers only the picture can tell. Colours, heights and places are sampled uniformly, so
that a model which does not look scores no better than the most frequent answer of each question kind.

Training and evaluation never share a picture: the split's name is part of the seed of the random generator.
What this leaves out on purpose: printed text, photographs, anything a model of a few million parameters cannot learn.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "ONE_WORD_KINDS", "Picture", "Question", "blank", "chance_level", "draw", "is_exact", "quiz"]

Split = Literal["train", "test"]
Scene = Literal["bars", "shapes"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (30, 150, 60),
    "yellow": (245, 205, 30),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
    "black": (25, 25, 25),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
BACKGROUNDS = ((255, 255, 255), (246, 246, 240), (232, 238, 244))

# Smallest difference that a question may ask about, as a fraction of the picture's side.
MIN_HEIGHT_GAP = 0.08
MIN_VERTICAL_GAP = 0.15

ONE_WORD_KINDS = (
    "tallest", "shortest", "bar_count", "nth_colour", "taller",
    "shape_count", "shape_of_colour", "colour_of_shape", "above",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question about a picture. `kind` is one of ONE_WORD_KINDS (a one-word answer) or "describe"."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """A drawn RGB image with every question that can be asked about it."""

    image: Image.Image
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Bar:
    colour: str
    height: float


@dataclass(frozen=True)
class _Shape:
    colour: str
    name: str
    x: float
    y: float
    radius: float


def draw(split: Split, seed: int, index: int, size: tuple[int, int] | None = None, scene: Scene | None = None) -> Picture:
    """The picture with number `index` of a stream. Same arguments, same picture.

    size: (width, height) in pixels; None draws at a random size between 192 and 384 a side. scene: None takes either.
    """
    rng = random.Random(f"{split}/{seed}/{index}")
    canvas_size = (rng.randint(192, 384), rng.randint(192, 384))
    either = rng.choice(("bars", "shapes"))
    return _SCENES[scene or either](rng, size or canvas_size)


def quiz(split: Split, seed: int, count: int) -> Iterator[tuple[Image.Image, Question]]:
    """`count` unseen pictures with one one-word question each, the question kinds taken in turn."""
    index = 0
    for number in range(count):
        kind = ONE_WORD_KINDS[number % len(ONE_WORD_KINDS)]
        while True:
            picture = draw(split, seed, index)
            index += 1
            candidates = [question for question in picture.questions if question.kind == kind]
            if candidates:
                yield picture.image, random.Random(f"pick/{split}/{seed}/{number}").choice(candidates)
                break


def blank(image: Image.Image) -> Image.Image:
    """A picture of the same size with nothing on it: what a model answers about it, it guesses."""
    return Image.new("RGB", image.size, (255, 255, 255))


def is_exact(reply: str, answer: str) -> bool:
    """True if the reply is the answer, letter case, outer space and a final full stop aside."""
    return reply.strip().rstrip(".").lower() == answer.strip().rstrip(".").lower()


def chance_level(questions: list[Question]) -> float:
    """Exact-answer rate of always giving each kind's most frequent answer, in [0, 1]."""
    if not questions:
        return 0.0
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers.values()) / len(questions)


def join_words(words: list[str]) -> str:
    """['a', 'b', 'c'] → 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _yes_no(condition: bool) -> str:
    return "yes" if condition else "no"


def _describe(rng: random.Random, answer: str) -> Question:
    texts = (
        "Describe the picture.",
        "Describe this image.",
        "What do you see?",
        "What is in the picture?",
        "Describe the image.",
    )
    return Question("describe", rng.choice(texts), answer)


# Bar charts


def _bar_chart(rng: random.Random, size: tuple[int, int]) -> Picture:
    count = rng.randint(2, 5)
    colours = rng.sample(list(COLOURS), count)
    heights = _spaced_values(rng, count, low=0.12, high=0.8, gap=MIN_HEIGHT_GAP)
    bars = [_Bar(colour, height) for colour, height in zip(colours, heights, strict=True)]
    return Picture(_paint_bars(rng, bars, size), tuple(_bar_questions(rng, bars)))


def _spaced_values(rng: random.Random, count: int, low: float, high: float, gap: float) -> list[float]:
    """`count` uniform values in [low, high], every two at least `gap` apart, in random order."""
    free = sorted(rng.uniform(low, high - gap * (count - 1)) for _ in range(count))
    values = [value + gap * rank for rank, value in enumerate(free)]
    rng.shuffle(values)
    return values


def _paint_bars(rng: random.Random, bars: list[_Bar], size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = Image.new("RGB", size, rng.choice(BACKGROUNDS))
    pen = ImageDraw.Draw(image)
    left, floor = rng.uniform(0.04, 0.12), rng.uniform(0.88, 0.94)
    step = (0.96 - left) / len(bars)
    thickness = step * rng.uniform(0.55, 0.8)
    if rng.random() < 0.5:
        for tick in range(1, 5):
            y = (floor - 0.2 * tick) * height
            pen.line((left * width, y, 0.97 * width, y), fill=(205, 205, 205), width=max(1, height // 200))
    for position, bar in enumerate(bars):
        x = left + step * (position + 0.5) - thickness / 2
        box = (x * width, (floor - bar.height) * height, (x + thickness) * width, floor * height)
        pen.rectangle(box, fill=COLOURS[bar.colour])
    axis = (90, 90, 90)
    pen.line((left * width, floor * height, 0.97 * width, floor * height), fill=axis, width=max(1, height // 100))
    if rng.random() < 0.6:
        pen.line((left * width, 0.06 * height, left * width, floor * height), fill=axis, width=max(1, width // 100))
    return image


def _bar_questions(rng: random.Random, bars: list[_Bar]) -> Iterator[Question]:
    ranked = sorted(bars, key=lambda bar: bar.height)
    colours = [bar.colour for bar in bars]
    colour = rng.choice(("colour", "color"))

    texts = (
        "Which bar is tallest?",
        "Which bar is the tallest?",
        "Which bar is the highest?",
        f"What {colour} is the tallest bar?",
    )
    yield Question("tallest", rng.choice(texts), ranked[-1].colour)
    texts = (
        "Which bar is shortest?",
        "Which bar is the shortest?",
        "Which bar is the lowest?",
        f"What {colour} is the shortest bar?",
    )
    yield Question("shortest", rng.choice(texts), ranked[0].colour)
    texts = ("How many bars are there?", "How many bars does the chart have?", "How many bars do you see?", "Count the bars.")
    yield Question("bar_count", rng.choice(texts), NUMBERS[len(bars)])
    for position in rng.sample(range(len(bars)), 2):
        nth = ORDINALS[position]
        texts = (
            f"What {colour} is the {nth} bar?",
            f"Which {colour} is the {nth} bar?",
            f"What is the {colour} of the {nth} bar?",
        )
        yield Question("nth_colour", rng.choice(texts), bars[position].colour)
    for _ in range(2):
        one, other = rng.sample(bars, 2)
        texts = (
            f"Is the {one.colour} bar taller than the {other.colour} bar?",
            f"Is the {one.colour} bar higher than the {other.colour} one?",
        )
        yield Question("taller", rng.choice(texts), _yes_no(one.height > other.height))
    yield _describe(
        rng,
        f"A bar chart with {NUMBERS[len(bars)]} bars: {join_words(colours)}. "
        f"The {ranked[-1].colour} bar is the tallest and the {ranked[0].colour} bar is the shortest.",
    )


# Shapes


def _shape_scatter(rng: random.Random, size: tuple[int, int]) -> Picture:
    count = rng.randint(1, 4)
    colours = rng.sample(list(COLOURS), count)
    names = [rng.choice(SHAPES) for _ in range(count)]
    columns = rng.sample(range(4), count)
    rows = _spaced_values(rng, count, low=0.15, high=0.85, gap=MIN_VERTICAL_GAP)
    shapes = [
        _Shape(colour, name, 0.14 + 0.24 * column + rng.uniform(-0.02, 0.02), row, rng.uniform(0.075, 0.105))
        for colour, name, column, row in zip(colours, names, columns, rows, strict=True)
    ]
    return Picture(_paint_shapes(rng, shapes, size), tuple(_shape_questions(rng, shapes)))


def _paint_shapes(rng: random.Random, shapes: list[_Shape], size: tuple[int, int]) -> Image.Image:
    width, height = size
    image = Image.new("RGB", size, rng.choice(BACKGROUNDS))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        outline = _OUTLINES[shape.name]
        points = [((shape.x + shape.radius * dx) * width, (shape.y + shape.radius * dy) * height) for dx, dy in outline()]
        pen.polygon(points, fill=COLOURS[shape.colour])
    return image


def _circle() -> list[tuple[float, float]]:
    return [(math.cos(math.tau * step / 48), math.sin(math.tau * step / 48)) for step in range(48)]


def _square() -> list[tuple[float, float]]:
    return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]


def _triangle() -> list[tuple[float, float]]:
    return [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]


def _star() -> list[tuple[float, float]]:
    radii = (1.15, 0.45)
    return [
        (radii[step % 2] * math.sin(math.pi * step / 5), -radii[step % 2] * math.cos(math.pi * step / 5)) for step in range(10)
    ]


_OUTLINES: dict[str, Callable[[], list[tuple[float, float]]]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
}  # fmt: skip


def _shape_questions(rng: random.Random, shapes: list[_Shape]) -> Iterator[Question]:
    from_top = sorted(shapes, key=lambda shape: shape.y)
    names = Counter(shape.name for shape in shapes)
    colour = rng.choice(("colour", "color"))

    texts = (
        "How many shapes are there?",
        "How many shapes do you see?",
        "Count the shapes.",
        "How many shapes does the picture have?",
    )
    yield Question("shape_count", rng.choice(texts), NUMBERS[len(shapes)])
    for shape in rng.sample(shapes, min(2, len(shapes))):
        texts = (f"What shape is {shape.colour}?", f"Which shape is {shape.colour}?", f"What is the {shape.colour} shape?")
        yield Question("shape_of_colour", rng.choice(texts), shape.name)
    for shape in shapes:
        if names[shape.name] == 1:
            texts = (
                f"What {colour} is the {shape.name}?",
                f"Which {colour} is the {shape.name}?",
                f"What is the {colour} of the {shape.name}?",
            )
            yield Question("colour_of_shape", rng.choice(texts), shape.colour)
    if len(shapes) > 1:
        for _ in range(2):
            one, other = rng.sample(shapes, 2)
            text = rng.choice(("Is the {} above the {}?", "Is the {} higher than the {}?"))
            subject, target = f"{one.colour} {one.name}", f"{other.colour} {other.name}"
            yield Question("above", text.format(subject, target), _yes_no(one.y < other.y))
    listing = join_words([f"{'an' if shape.colour == 'orange' else 'a'} {shape.colour} {shape.name}" for shape in from_top])
    plural = "shape" if len(shapes) == 1 else "shapes"
    sentence = f"A picture with {NUMBERS[len(shapes)]} {plural}: {listing}."
    if len(shapes) > 1:
        sentence += f" The {from_top[0].colour} {from_top[0].name} is at the top."
    yield _describe(rng, sentence)


_SCENES: dict[str, Callable[[random.Random, tuple[int, int]], Picture]] = {"bars": _bar_chart, "shapes": _shape_scatter}
