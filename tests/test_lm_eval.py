"""lm-eval's harness on the bundled model, offline: task files of our own, a text one and a picture one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from gemma_opt import charts
from gemma_opt.errors import UsageError
from gemma_opt.evaluation.quiz import run_quiz
from gemma_opt.loading import resolve
from gemma_opt.service import Service

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval; it needs 700 MB of packages)")
pytestmark = pytest.mark.filterwarnings("default")  # the harness and its libraries warn about each other

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports] an extra

    from gemma_opt.evaluation.lm_eval_adapter import CompressedLM, Tasks

QUESTIONS = 6
CHOICE_TASK = """
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
CHART_TASK = """
task: small_charts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_image: !function pictures.load
doc_to_text: "<image>{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}]
"""
LOADER = "from PIL import Image\n\n\ndef load(doc):\n    return [Image.open(doc['file'])]\n"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    running = Service.load(resolve("small-int8"), "cpu")
    yield running
    running.close()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"The bar {number} is", "choices": ["red", "blue"], "answer": number % 2} for number in range(QUESTIONS)
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "choice.yaml").write_text(CHOICE_TASK.format(data=folder / "choice.jsonl"))
    pictures = list[dict[str, str]]()
    for number, (image, question) in enumerate(charts.quiz("test", 1, QUESTIONS)):
        image.save(folder / f"{number}.png")
        pictures.append({"file": str(folder / f"{number}.png"), "question": question.text, "answer": question.answer})
    (folder / "charts.jsonl").write_text("\n".join(map(json.dumps, pictures)))
    (folder / "charts.yaml").write_text(CHART_TASK.format(data=folder / "charts.jsonl"))
    (folder / "pictures.py").write_text(LOADER)
    return folder


def likelihood(service: Service, context: str, continuation: str) -> tuple[float, bool]:
    """The oracle: one forward of one sequence, token after token."""
    tokenizer, model = service.ready.processing.tokenizer, service.ready.model
    before = [tokenizer.bos_token_id, *tokenizer.encode(context, add_special_tokens=False)]
    whole = [tokenizer.bos_token_id, *tokenizer.encode(context + continuation, add_special_tokens=False)]
    total, greedy = 0.0, True
    with torch.inference_mode():
        for position in range(len(before), len(whole)):
            row = torch.log_softmax(model(torch.tensor([whole[:position]])).logits[0, -1].double(), -1)
            total += float(row[whole[position]])
            greedy = greedy and int(row.argmax()) == whole[position]
    return total, greedy


def ask(kind: str, *arguments: object) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


def test_the_picture_task_scores_what_our_own_quiz_scores(service: Service, tasks: Path) -> None:
    found = Tasks(["small_charts"], tasks).run(service)
    assert found["small_charts"]["exact_match"] == pytest.approx(run_quiz(service, QUESTIONS, 1).accuracy)


def test_a_choice_task_runs_with_a_limit(service: Service, tasks: Path) -> None:
    found = Tasks(["small_choice", "small_charts"], tasks).run(service, limit=2)
    assert found["small_choice"]["acc"] in (0.0, 0.5, 1.0)
    assert found.keys() == {"small_choice", "small_charts"}


def test_likelihoods_equal_a_naive_loop(service: Service) -> None:
    pairs = [
        ("The tallest bar is", " red"),
        ("The tallest bar is", " blue"),
        ("A bar chart with ", "two bars: red"),
        ("", "A bar"),
    ]
    found = CompressedLM(service).loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        spaces = len(context) - len(context.rstrip())
        expected = likelihood(service, context.rstrip(), context[len(context) - spaces :] + continuation)
        assert score == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]


def test_rolling_likelihood_of_a_short_text_is_its_likelihood(service: Service) -> None:
    text = "A bar chart with two bars: red and blue."
    (found,) = CompressedLM(service).loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    assert found == pytest.approx(likelihood(service, "", text)[0], rel=1e-4)


def test_replies_stop_before_a_stop_string(service: Service) -> None:
    lm, options = CompressedLM(service), {"until": [" with"], "max_gen_toks": 20}
    whole, cut = lm.generate_until(
        [ask("generate_until", "A bar chart", {"until": [], "max_gen_toks": 20}), ask("generate_until", "A bar chart", options)]
    )
    assert cut == whole.partition(" with")[0]


def test_one_bos_and_no_more(service: Service) -> None:
    lm = CompressedLM(service)
    assert lm.tok_encode("<bos>A bar")[:2] == lm.tok_encode("A bar")[:2]
    assert lm.tok_encode("A bar").count(lm.prefix_token_id) == 1
    assert lm.prefix_token_id not in lm.tok_encode("A bar", add_special_tokens=False)


def test_the_harness_leaves_head_and_embedding_as_they_are(tasks: Path) -> None:
    """lm-eval's own Hugging Face class ties the head again and so silently undoes an untied or quantized one."""
    with closing(Service.load(resolve("small-bf16"), "cpu")) as service:
        model = service.ready.model
        tied, logits = model.lm_head.weight, model(torch.tensor([[2, 300]])).logits
        untied = torch.nn.Parameter(tied.detach() * 2)
        model.lm_head.weight = untied
        Tasks(["small_choice"], tasks).run(service, limit=1)
        assert model.lm_head.weight is untied
        assert model.get_input_embeddings().weight is tied
        torch.testing.assert_close(model(torch.tensor([[2, 300]])).logits, 2 * logits)


def test_what_is_not_supported_is_said(service: Service) -> None:
    lm, picture = CompressedLM(service), charts.draw("test", 1, 0).image
    with pytest.raises(UsageError, match="not supported: num_beams"):
        lm.generate_until([ask("generate_until", "A", {"num_beams": 4})])
    with pytest.raises(UsageError, match="2 pictures for 1 places"):
        lm.generate_until([ask("generate_until", "<image>A", {}, {"visual": [picture, picture]})])
    with pytest.raises(UsageError, match="answers to a picture"):
        lm.loglikelihood([ask("loglikelihood", "A", "B", {"visual": []})])


@pytest.mark.slow
def test_unknown_tasks_are_named_before_there_is_a_model() -> None:
    with pytest.raises(UsageError, match="knows no task no_such_task"):
        Tasks(["no_such_task"])
