"""The pictures and questions: reproducible, disjoint, answerable, and not answerable without looking."""

from __future__ import annotations

from collections import Counter

import pytest

from gemma_opt import charts


def test_same_arguments_same_picture() -> None:
    one, other = charts.draw("train", 3, 14), charts.draw("train", 3, 14)
    assert one.questions == other.questions
    assert one.image.tobytes() == other.image.tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_no_picture(seed: int) -> None:
    train = {charts.draw("train", seed, index, size=(64, 64)).image.tobytes() for index in range(300)}
    test = {charts.draw("test", seed, index, size=(64, 64)).image.tobytes() for index in range(300)}
    assert not train & test


def test_a_quiz_takes_the_kinds_in_turn() -> None:
    questions = [question for _, question in charts.quiz("test", 0, 18)]
    assert [question.kind for question in questions] == list(charts.ONE_WORD_KINDS) * 2
    assert all(" " not in question.answer for question in questions)


def test_the_tallest_bar_really_is_the_tallest() -> None:
    """Counts pixels of each bar's colour column by column, independently of how bars are drawn."""
    checked = 0
    for index in range(60):
        picture = charts.draw("test", 5, index, size=(200, 200))
        for question in picture.questions:
            if question.kind == "tallest":
                heights = {name: pixel_height(picture, colour) for name, colour in charts.COLOURS.items()}
                assert max(heights, key=heights.__getitem__) == question.answer
                checked += 1
    assert checked > 10


def pixel_height(picture: charts.Picture, colour: tuple[int, int, int]) -> int:
    rows = [
        y for y in range(picture.image.height) for x in range(picture.image.width) if picture.image.getpixel((x, y)) == colour
    ]
    return max(Counter(rows).keys(), default=0) - min(rows, default=0)


def test_chance_is_the_majority_answer_of_each_kind() -> None:
    def asked(kind: str, *answers: str) -> list[charts.Question]:
        return [charts.Question(kind, "?", answer) for answer in answers]

    assert charts.chance_level(asked("taller", "yes", "yes", "no") + asked("bar_count", "two", "three")) == pytest.approx(3 / 5)
    assert charts.chance_level([]) == 0
    assert charts.chance_level([question for _, question in charts.quiz("test", 1, 300)]) < 0.4


@pytest.mark.parametrize(("reply", "exact"), [("Green.", True), (" green\n", True), ("green bar", False), ("", False)])
def test_exact_forgives_case_space_and_full_stop_only(reply: str, exact: bool) -> None:
    assert charts.is_exact(reply, "green") is exact


def test_words_are_joined_as_people_do() -> None:
    assert [charts.join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
