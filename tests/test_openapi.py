"""predict.py's literals, the committed interface description, cog.yaml and the library say the same."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from gemma_opt.engine.interface import LIMITS, SamplingParams
from gemma_opt.recipe import packaged_recipes
from gemma_opt.service import Request

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/openapi.py"
CONTRACT = (
    "prompt", "image", "images", "system_prompt", "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "stop_sequences", "seed", "messages", "pan_and_scan",
)  # fmt: skip
CONFIG_KEYS = {"build", "predict", "environment"}
BUILD_KEYS = {"gpu", "python_version", "python_requirements", "system_packages", "sdk_version"}

generate: Callable[[Path], str] = runpy.run_path(str(SCRIPT))["generate"]
document = json.loads((ROOT / "openapi.json").read_text("utf-8"))
schemas = document["components"]["schemas"]
inputs = schemas["Input"]["properties"]
config = yaml.safe_load((ROOT / "cog.yaml").read_text("utf-8"))


def test_committed_document_is_what_the_script_writes() -> None:
    check = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_inputs_stand_in_the_contracts_order() -> None:
    """Clients of LangChain and LlamaIndex send their prompt to the input whose x-order is 0."""
    assert tuple(inputs) == CONTRACT
    assert [inputs[name]["x-order"] for name in CONTRACT] == list(range(len(CONTRACT)))


def test_no_input_is_required() -> None:
    assert "required" not in schemas["Input"]
    assert all("default" in schema for schema in inputs.values())


@pytest.mark.parametrize("name", LIMITS)
def test_limits_and_defaults_are_the_engines(name: str) -> None:
    limit = LIMITS[name]
    assert (inputs[name]["minimum"], inputs[name]["maximum"]) == (limit.low, limit.high)
    assert inputs[name]["default"] == (None if name == "seed" else getattr(SamplingParams(), name))


def test_only_the_engines_parameters_have_limits() -> None:
    assert {name for name, schema in inputs.items() if "minimum" in schema or "maximum" in schema} == set(LIMITS)


@pytest.mark.parametrize("predictor", ["Predictor", "ConcurrentPredictor"])
def test_both_predictors_have_this_interface(predictor: str, tmp_path: Path) -> None:
    """Only then is one word in cog.yaml enough to choose the other one."""
    (tmp_path / "predict.py").write_text((ROOT / "predict.py").read_text("utf-8"), "utf-8")
    chosen = (ROOT / "cog.yaml").read_text("utf-8").replace(config["predict"], f"predict.py:{predictor}")
    (tmp_path / "cog.yaml").write_text(chosen, "utf-8")
    assert json.loads(generate(tmp_path)) == document


def test_inputs_reach_the_request_in_its_order() -> None:
    """predict.py hands them over by position."""
    assert tuple(field.name for field in fields(Request)) == CONTRACT
    tree = ast.parse((ROOT / "predict.py").read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Request"]
    assert [tuple(map(ast.unparse, call.args)) for call in calls] == [CONTRACT] * 2


def test_defaults_are_the_services() -> None:
    defaults = {field.name: field.default for field in fields(Request)}
    assert {name: schema["default"] for name, schema in inputs.items()} == defaults


def test_pictures_keep_their_upload_field() -> None:
    assert inputs["image"]["format"] == inputs["images"]["items"]["format"] == "uri"


def test_types_are_those_that_cogs_generator_makes() -> None:
    text = {"type": "string", "nullable": True}
    assert inputs["stop_sequences"]["anyOf"] == [text, {"type": "array", "items": {"type": "string"}, "nullable": True}]
    assert (inputs["messages"]["type"], inputs["messages"]["items"]) == ("array", {"type": "object"})
    nullable = {name for name, schema in inputs.items() if schema.get("nullable")}
    assert nullable == {"image", "images", "stop_sequences", "seed", "messages"}


def test_answers_stream_as_text() -> None:
    assert document["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert (schemas["Output"]["x-cog-array-type"], schemas["Output"]["x-cog-array-display"]) == ("iterator", "concatenate")


def test_every_reference_has_its_target() -> None:
    targets = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert set(targets) <= set(schemas)


def test_every_description_is_one_plain_literal() -> None:
    """Cog reads the characters between the quotes: parts are lost, escapes stay as they are written."""
    source = (ROOT / "predict.py").read_text("utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Input"]
    descriptions = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "description"]
    assert len(descriptions) == len(CONTRACT)
    for description in descriptions:
        assert isinstance(description, ast.Constant)
        assert ast.get_source_segment(source, description) == f'"{description.value}"'


@pytest.mark.parametrize(
    ("parameter", "problem"),
    [
        ('x: int = Input(default=1, le=LIMIT, description="d")', "not a literal"),
        ('x: int = Input(default=1, description=f"up to {LIMIT}")', "not a literal"),
        ('x: int = Input(default=1, description="one " "two")', "description"),
        ('x: int = Input(default=1, description="a \\"word\\"")', "description"),
        ('x: Literal["a", "b"] = Input(default="a")', "no input type"),
        ('x: str | Path = Input(default="a")', "no input type"),
        ("x: int = Input(ge=1)", "without a default"),
        ("x: int = Input(1)", "keywords only"),
        ("x: int = Inputs.x", "keywords only"),
        ("x: int = 1", "keywords only"),
        ("x=Input(default=1)", "no type"),
    ],
)
def test_refuses_what_cog_would_drop_or_mangle(parameter: str, problem: str, tmp_path: Path) -> None:
    signature = f"def predict(self, {parameter}) -> ConcatenateIterator[str]: ..."
    (tmp_path / "predict.py").write_text(f"class Predictor:\n    @cog.streaming\n    {signature}\n", "utf-8")
    (tmp_path / "cog.yaml").write_text("{predict: 'predict.py:Predictor', build: {sdk_version: '0'}}", "utf-8")
    with pytest.raises(Exception, match=problem) as raised:
        generate(tmp_path)
    assert type(raised.value).__name__ == "UnreadableSignature"


def test_cog_yaml_has_only_keys_that_cog_knows() -> None:
    """An unknown key makes `cog build` fail."""
    assert set(config) == CONFIG_KEYS
    assert set(config["build"]) == BUILD_KEYS


def test_cog_yaml_names_things_that_exist() -> None:
    file, _, class_name = config["predict"].partition(":")
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert class_name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert (ROOT / config["build"]["python_requirements"]).is_file()


def test_the_image_gets_the_pinned_versions() -> None:
    """torch 2.11.0 is the newest that Cog has a CUDA for, and torchao 0.18.0 needs it."""
    lines = (ROOT / config["build"]["python_requirements"]).read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert (pins["torch"], pins["torchao"], pins["cog"]) == ("2.11.0", "0.18.0", config["build"]["sdk_version"])
    assert document["info"]["version"] == config["build"]["sdk_version"]


def test_the_images_recipe_is_packaged() -> None:
    environment = dict(entry.split("=", 1) for entry in config["environment"])
    assert environment["GEMMA_OPT_RECIPE"] in packaged_recipes()
