"""Writes openapi.json, the description of predict.py's HTTP interface, without importing predict.py.

Cog makes such a document itself when it builds. This one replaces it (`cog build --openapi-schema openapi.json`) because
pictures are declared as strings there, and only `format: uri` gives them an upload field in web forms. It is also what
lets the server run without Docker (gemma_opt/serving.py). Types, null and numbers follow Cog's own generator (read at 0.22);
where that one silently drops or mangles something (computed limits, f-strings, text in several pieces), this one stops.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "openapi.json"
PICTURE_INPUTS = ("image", "images")
PRIMITIVES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object"}
LIMITS = {"ge": "minimum", "le": "maximum"}

Schema = dict[str, object]

# All that does not depend on predict.py: the routes that coglet serves and their envelopes.
FRAME = """
openapi: 3.0.2
info: {title: Cog}
paths:
  /:
    get: {summary: Root, operationId: root__get, responses: {"200": &done {
      description: Successful Response, content: {application/json: {schema: {}}}}}}
  /health-check:
    get: {summary: Healthcheck, operationId: healthcheck_health_check_get, responses: {"200": *done}}
  /predictions:
    post: &predict
      summary: Predict
      description: Run a single prediction on the model
      operationId: predict_predictions_post
      requestBody: {content: {application/json: {schema: {$ref: "#/components/schemas/PredictionRequest"}}}}
      responses:
        "200": {description: Successful Response, content: {application/json: {
          schema: {$ref: "#/components/schemas/PredictionResponse"}}}}
        "422": &refused {description: Validation Error, content: {application/json: {
          schema: {$ref: "#/components/schemas/HTTPValidationError"}}}}
      x-cog-streaming: true
  /predictions/{prediction_id}:
    put:
      <<: *predict
      description: Run a single prediction under an id of the client's choice
      operationId: predict_predictions__prediction_id__put
      parameters: &named [{name: prediction_id, in: path, required: true, schema: {title: Prediction Id, type: string}}]
  /predictions/{prediction_id}/cancel:
    post:
      summary: Cancel
      operationId: cancel_predictions__prediction_id__cancel_post
      parameters: *named
      responses: {"200": *done, "422": *refused}
components:
  schemas:
    Input: {title: Input, type: object, properties: {}}
    Output: {title: Output, type: array, items: {type: string}, x-cog-array-type: iterator, x-cog-array-display: concatenate}
    PredictionRequest:
      title: PredictionRequest
      type: object
      properties:
        id: {title: Id, type: string}
        input: {$ref: "#/components/schemas/Input"}
        webhook: {title: Webhook, type: string, format: uri}
        webhook_events_filter:
          {title: Webhook Events Filter, type: array, items: {$ref: "#/components/schemas/WebhookEvent"}}
    PredictionResponse:
      title: PredictionResponse
      type: object
      properties:
        input: {$ref: "#/components/schemas/Input"}
        output: {$ref: "#/components/schemas/Output"}
        id: {title: Id, type: string}
        version: {title: Version, type: string}
        created_at: {title: Created At, type: string, format: date-time}
        started_at: {title: Started At, type: string, format: date-time}
        completed_at: {title: Completed At, type: string, format: date-time}
        status: {$ref: "#/components/schemas/Status"}
        error: {title: Error, type: string}
        logs: {title: Logs, type: string}
        metrics: {title: Metrics, type: object}
    Status: {title: Status, type: string, enum: [starting, processing, succeeded, canceled, failed]}
    WebhookEvent: {title: WebhookEvent, type: string, enum: [start, output, logs, completed]}
    HTTPValidationError:
      title: HTTPValidationError
      type: object
      properties: {detail: {title: Detail, type: array, items: {$ref: "#/components/schemas/ValidationError"}}}
    ValidationError:
      title: ValidationError
      type: object
      required: [loc, msg, type]
      properties:
        loc: {title: Location, type: array, items: {anyOf: [{type: string}, {type: integer}]}}
        msg: {title: Message, type: string}
        type: {title: Error Type, type: string}
"""


class UnreadableSignature(Exception):
    """predict.py says something that Cog's static reader would refuse, drop or mangle."""

    def __init__(self, problem: str, node: ast.expr | ast.arg | ast.stmt | None = None) -> None:
        super().__init__(f"line {node.lineno}: {problem}" if node else problem)


def generate(root: Path = ROOT) -> str:
    """The document's text, from the predictor that cog.yaml names. Raises UnreadableSignature."""
    config = yaml.safe_load((root / "cog.yaml").read_text("utf-8"))
    file, _, class_name = config["predict"].partition(":")
    source = (root / file).read_text("utf-8")
    document = yaml.safe_load(FRAME)
    document["info"]["version"] = config["build"]["sdk_version"]
    document["components"]["schemas"]["Input"]["properties"] = dict(input_schemas(find_predict(source, class_name), source))
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def find_predict(source: str, class_name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The predict method of a class, made sure that it is what the frame says: one that streams text."""
    classes = {item.name: item.body for item in ast.parse(source).body if isinstance(item, ast.ClassDef)}
    methods = {
        item.name: item for item in classes.get(class_name, ()) if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    predict = methods.get("predict")
    if predict is None:
        raise UnreadableSignature(f"there is no method {class_name}.predict")
    if predict.returns is None or ast.unparse(predict.returns) != "ConcatenateIterator[str]":
        raise UnreadableSignature("predict must return ConcatenateIterator[str]", predict)
    if "cog.streaming" not in map(ast.unparse, predict.decorator_list):
        raise UnreadableSignature("predict must be decorated with @cog.streaming", predict)
    return predict


def shared_inputs(source: str) -> dict[str, ast.expr]:
    """`Class.attribute` → the Input(...) that it is in this file: Cog's reader follows such names, one step."""
    return {
        f"{item.name}.{ast.unparse(line.targets[0])}": line.value
        for item in ast.parse(source).body
        if isinstance(item, ast.ClassDef)
        for line in item.body
        if isinstance(line, ast.Assign)
    }


def input_schemas(predict: ast.FunctionDef | ast.AsyncFunctionDef, source: str) -> Iterator[tuple[str, Schema]]:
    """Name and schema of every input, in order."""
    shared = shared_inputs(source)
    for order, (argument, default) in enumerate(zip(predict.args.args[1:], predict.args.defaults, strict=True)):
        if argument.annotation is None:
            raise UnreadableSignature(f"{argument.arg} has no type", argument)
        title = " ".join(word[:1].upper() + word[1:] for word in argument.arg.split("_"))
        uri = argument.arg in PICTURE_INPUTS
        keywords = input_keywords(shared.get(ast.unparse(default), default), source)
        yield argument.arg, {"x-order": order, "title": title, **type_schema(argument.annotation, uri=uri), **keywords}


def type_schema(annotation: ast.expr, *, uri: bool) -> Schema:
    """`A | B | None` → JSON schema. In a union every alternative repeats `nullable`, as Cog's generator has it."""
    members = union_members(annotation)
    kinds = [member for member in members if not (isinstance(member, ast.Constant) and member.value is None)]
    nullable: Schema = {"nullable": True} if len(kinds) < len(members) else {}
    schemas = [member_schema(kind, uri=uri) | nullable for kind in kinds]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas} | nullable


def union_members(node: ast.expr) -> list[ast.expr]:
    """The alternatives of `A | B | …`, in order."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*union_members(node.left), *union_members(node.right)]
    return [node]


def member_schema(node: ast.expr, *, uri: bool) -> Schema:
    """The schema of one type. uri: a text that names a picture."""
    match node:
        case ast.Name(id=name) if name in PRIMITIVES:
            return {"type": PRIMITIVES[name], **({"format": "uri"} if uri else {})}
        case ast.Subscript(value=ast.Name(id="list"), slice=ast.Name() as element):
            return {"type": "array", "items": member_schema(element, uri=uri)}
        case _:
            raise UnreadableSignature(f"{ast.unparse(node)} is no input type that Cog reads", node)


def input_keywords(call: ast.expr, source: str) -> Schema:
    """What `Input(...)` says: default, description, limits."""
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "Input" and not call.args):
        raise UnreadableSignature("every input must be Input(...) with keywords only", call)
    found: Schema = {}
    for keyword in call.keywords:
        value = literal(keyword.value)
        if keyword.arg == "default":
            found["default"] = value
        elif keyword.arg in LIMITS and type(value) in (int, float):
            found[LIMITS[keyword.arg]] = value
        elif keyword.arg == "description" and ast.get_source_segment(source, keyword.value) == f'"{value}"':
            found["description"] = value
        else:
            raise UnreadableSignature(f"Cog would not read this {keyword.arg} as it is meant", keyword.value)
    if "default" not in found:
        raise UnreadableSignature("an input without a default is required: give it one", call)
    return found


def literal(node: ast.expr) -> object:
    """A literal's value; a whole number loses its decimal point, as in Go."""
    if not isinstance(node, ast.Constant):
        raise UnreadableSignature(f"{ast.unparse(node)} is not a literal: Cog would drop it", node)
    return int(node.value) if isinstance(node.value, float) and node.value.is_integer() else node.value


def main() -> int:
    """Write the document, or with --check compare it. 1: not up to date, or predict.py cannot be read."""
    parser = argparse.ArgumentParser(description="Write openapi.json from predict.py.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if openapi.json is not up to date")
    check = parser.parse_args().check
    try:
        text = generate()
    except UnreadableSignature as error:
        print(f"the predictor's signature, {error}", file=sys.stderr)
        return 1
    if not check:
        DOCUMENT.write_text(text, "utf-8")
    elif not DOCUMENT.is_file() or DOCUMENT.read_text("utf-8") != text:
        print("openapi.json is not up to date: run python scripts/openapi.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
