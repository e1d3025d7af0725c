"""Exported folders: what plain transformers makes of them is what this package makes of the checkpoint."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
import torch
import yaml
from models import chart, oracle_inputs, processing
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig

from gemma_opt import gemma, loading
from gemma_opt.build import build
from gemma_opt.errors import BaseModelError, UsageError
from gemma_opt.export import ExportFormat, export
from gemma_opt.prompt import PromptEncoder, single_turn
from gemma_opt.recipe import Recipe

CPU = torch.device("cpu")
FLOAT, PACKED = ExportFormat.TRANSFORMERS, ExportFormat.COMPRESSED_TENSORS
CHARTS = "calibration={source: [charts], windows: 2, window_tokens: 128}"


def recipe(name: str, *overrides: str) -> Recipe:
    return Recipe.load(name, ("name=exported", *overrides))


def text_format(options: str) -> Recipe:
    return recipe("small-int8", f"quantization.default={options}", CHARTS)


def source_of(chosen: Recipe, tmp_path: Path) -> loading.Source:
    """The recipe itself, or its finished folder where it needs data."""
    if not chosen.needs_data:
        return loading.Source(chosen)
    build(chosen, tmp_path / "built", questions=0)
    return loading.Source(chosen, tmp_path / "built")


def logits(model: gemma.GemmaModel) -> Tensor:
    prompt = PromptEncoder(processing(), 512).encode(single_turn("Which bar is tallest?", "", [chart()]))
    inputs = oracle_inputs(model, prompt)
    with torch.inference_mode():
        return model(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}).logits.float()


def ours(source: loading.Source) -> Tensor:
    return logits(loading.open_model(source, "cpu").model)


def theirs(folder: Path, *, dequantize: bool = False) -> Tensor:
    """Logits of the folder under transformers alone, every tensor of it used and none made up."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return logits(model)


def distance(one: Tensor, other: Tensor) -> float:
    """RMS of the difference, relative."""
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def tensor_names(folder: Path) -> dict[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118 it is no dictionary
    return found


@pytest.mark.parametrize(
    "chosen",
    [
        recipe("small-bf16"),
        recipe("small-int8-pruned"),
        recipe("small-int4"),
        recipe("small-int8", "sparsity=[{method: compact, ratio: 0.25}]", CHARTS),
        recipe("small-int8", "lowrank=[{roles: [down, up], ratio: 0.5, whiten: false}]"),
    ],
    ids=["bf16", "pruned", "int4", "compact", "lowrank"],
)
def test_transformers_computes_what_we_compute(chosen: Recipe, tmp_path: Path) -> None:
    source = source_of(chosen, tmp_path)
    made = export(source, tmp_path / "out", FLOAT, "float32")
    assert distance(theirs(tmp_path / "out"), ours(source)) < 1e-5
    assert made.bytes == sum(tensor.nbytes for tensor in _tensors(tmp_path / "out").values())


def _tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 it is no dictionary


def test_names_and_dtypes_are_those_of_the_hub(tmp_path: Path) -> None:
    export(loading.Source(recipe("small-int8")), tmp_path / "out", FLOAT, "bfloat16")
    found = tensor_names(tmp_path / "out")
    assert set(found.values()) == {torch.bfloat16}
    for name in (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "multi_modal_projector.mm_input_projection_weight",
    ):
        assert name in found
    assert not [name for name in found if "lm_head" in name or "scale" in name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "options",
    [
        "int8",
        "{format: int4, group: 32, symmetric: true}",
        "{format: int4, group: 64, symmetric: false}",
        "fp8",
    ],
)
def test_quantized_weights_stay_what_they_are(options: str, tmp_path: Path) -> None:
    source = source_of(text_format(options), tmp_path)
    export(source, tmp_path / "out", PACKED)
    assert distance(theirs(tmp_path / "out", dequantize="false" in options), ours(source)) < 1e-5
    found = tensor_names(tmp_path / "out")
    stored = {dtype for name, dtype in found.items() if "gate_proj" in name and "scale" not in name and "shape" not in name}
    assert stored == {torch.float8_e4m3fn if options == "fp8" else torch.int32}


@pytest.mark.parametrize("form", [FLOAT, PACKED])
@pytest.mark.parametrize("options", ["int8", "{format: int4, symmetric: true}"])
def test_bfloat16_models_too(options: str, form: ExportFormat, tmp_path: Path) -> None:
    source = loading.Source(recipe("small-int8", f"quantization.default={options}", "model.dtype=bfloat16"))
    export(source, tmp_path / "out", form)
    assert distance(theirs(tmp_path / "out"), ours(source)) < 0.01  # sums in another order, rounded to 8 bits


@pytest.mark.parametrize("options", ["int8_dynamic", "int8_static", "fp8_dynamic", "fp8_static", "int8_dynamic_int4"])
def test_inputs_are_quantized_as_we_quantize_them(options: str, tmp_path: Path) -> None:
    chosen = text_format("{format: int8_dynamic_int4, symmetric: true}" if options == "int8_dynamic_int4" else options)
    source = source_of(chosen, tmp_path)
    export(source, tmp_path / "packed", PACKED)
    export(source, tmp_path / "floats", FLOAT)
    wanted = ours(source)
    close = distance(theirs(tmp_path / "packed"), wanted)
    assert close < 0.7 * distance(theirs(tmp_path / "floats"), wanted)  # whose inputs are floats
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["type"], inputs["dynamic"]) == ("float" if "fp8" in options else "int", "static" not in options)


def test_roles_may_have_formats_of_their_own(tmp_path: Path) -> None:
    roles = "{vision: int8, embedding: int8, query: fp8, key: fp8, value: fp8, output: bf16}"
    source = loading.Source(recipe("small-int8", f"quantization.roles={roles}"))
    export(source, tmp_path / "out", PACKED)
    assert distance(theirs(tmp_path / "out"), ours(source)) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert "re:.*o_proj$" in config["ignore"]
    assert tensor_names(tmp_path / "out")["language_model.model.layers.1.self_attn.o_proj.weight"] == torch.float32


def test_an_export_is_a_base_model_again(tmp_path: Path) -> None:
    source = loading.Source(recipe("small-int8"))
    export(source, tmp_path / "out", FLOAT, "float32")
    again = loading.open_model(loading.resolve(str(tmp_path / "out"), "cpu"), "cpu")
    assert distance(logits(again.model), ours(source)) < 1e-5
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.chat_template


def test_a_quantized_export_is_no_base_model(tmp_path: Path) -> None:
    export(loading.Source(recipe("small-int8")), tmp_path / "out", PACKED)
    with pytest.raises(BaseModelError, match="quantized already"):
        loading.open_model(loading.resolve(str(tmp_path / "out"), "cpu"), "cpu")


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    export(loading.Source(recipe("small-int4")), tmp_path / "out", PACKED)
    _, metadata, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata) == {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    assert "dequantize=True" in text
    shown = text.partition("```yaml\n")[2].partition("```")[0]
    assert Recipe.from_tree(yaml.safe_load(shown), "card").digest() == recipe("small-int4").digest()


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no quantized text linears"):
        export(loading.Source(recipe("small-bf16")), tmp_path / "out", PACKED)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="floats are float32"):
        export(loading.Source(recipe("small-bf16")), tmp_path / "out", ExportFormat.EXECUTORCH, "bfloat16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="replaces nothing"):
        export(loading.Source(recipe("small-int8")), tmp_path / "full", FLOAT)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes.txt"]


class Hub(ThreadingHTTPServer):
    """The hub's side of an upload, as far as huggingface_hub asks. status: its answer to commits. files: what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswers)
        self.status = 200
        self.visibility = ""
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubAnswers(BaseHTTPRequestHandler):
    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server)

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        match self.path.rpartition("/me/gemma")[2].partition("?")[0]:
            case "/preupload/main":
                self.answer({"files": [entry | {"uploadMode": "regular", "shouldIgnore": False} for entry in named(body)]})
            case "/commit/main":
                lines = [json.loads(line) for line in body.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                self.hub.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
                self.answer({"commitUrl": f"{self.hub.address}/me/gemma/commit/1", "commitOid": "1"}, self.hub.status)
            case "/api/repos/create":
                self.hub.visibility = json.loads(body)["visibility"]
                self.answer({"url": f"{self.hub.address}/me/gemma"})
            case _:
                self.answer({})

    def answer(self, value: dict[str, object], status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests are quiet."""


def named(body: bytes) -> list[dict[str, object]]:
    return [{"path": entry["path"]} for entry in json.loads(body)["files"]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(hub: Hub, *arguments: str, token: str = "hf_test") -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    command = [sys.executable, "-m", "gemma_opt", "export", "small-int8", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)


def test_a_push_carries_every_file_of_the_folder(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, "--out", str(tmp_path / "out"), "--push", "me/gemma", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == f"{hub.address}/me/gemma/commit/1"
    assert hub.visibility == "private"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_refused_push_leaves_the_folder_and_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    hub.status = 403
    refused = run(hub, "--out", str(tmp_path / "out"), "--push", "me/gemma")
    assert refused.returncode == 1
    assert "error: E3006 me/gemma: HF_TOKEN may not write there." in refused.stderr
    assert refused.stderr.endswith(f"try again with: hf upload me/gemma {tmp_path / 'out'}\n")
    assert distance(theirs(tmp_path / "out"), ours(loading.Source(recipe("small-int8")))) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "token", "why"),
    [
        (("--push", "gemma"), "hf_test", "lacks its owner"),
        (("--push", "me/gem ma"), "hf_test", "cannot be a repository"),
        (("--push", "me/gemma"), "", "set HF_TOKEN"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], token: str, why: str, hub: Hub, tmp_path: Path
) -> None:
    refused = run(hub, "--out", str(tmp_path / "out"), *arguments, token=token)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: E2000 ")
    assert why in refused.stderr
    assert not list(tmp_path.iterdir())
