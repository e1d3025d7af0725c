"""Recipe files in: packaged or by path, overrides, and errors that name every offending key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from gemma_opt.errors import RecipeError, RecipeNotFound


def packaged_recipes() -> dict[str, str]:
    """Name → YAML text of every recipe in the package."""
    folder = resources.files("gemma_opt") / "recipes"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8") for entry in files}


def read_source(source: str | Path) -> str:
    """The text of a recipe file, or of the packaged recipe of that name. Raises RecipeNotFound, RecipeError."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeNotFound(f"no recipe file {path}")
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError:
            raise RecipeError(f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    packaged = packaged_recipes()
    if str(source) not in packaged:
        raise RecipeNotFound(f"no recipe named {str(source)!r}; packaged recipes: {', '.join(packaged)}; or give a .yaml file")
    return packaged[str(source)]


def set_path(tree: dict[str, object], override: str) -> None:
    """Apply one `sparsity.0.ratio=0.3`. The value is YAML, so numbers, lists and null work. Raises RecipeError."""
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"override {override!r} is not KEY=VALUE, as in sparsity.0.ratio=0.3")
    parsed = parse_yaml(value, f"override {override!r}: the value")
    node: object = tree
    *parents, last = path.split(".")
    for key in parents:
        if isinstance(node, dict) and key not in node:
            node[key] = {}
        node = _child(node, key, override)
    if isinstance(node, list):
        index = _index(node, last, override)
        node[index : index + 1] = [parsed]
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise RecipeError(f"override {override!r}: there is no section to hold {last!r}")


def parse_yaml(text: str, what: str) -> object:
    """The value that a text is in YAML. Raises RecipeError; `what` names the text in it."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise RecipeError(f"{what} is not YAML: {' '.join(str(error).split())}") from None


def _child(node: object, key: str, override: str) -> object:
    if isinstance(node, dict):
        return node[key]
    if isinstance(node, list):
        return node[_index(node, key, override)]
    raise RecipeError(f"override {override!r}: {key!r} is inside a plain value")


def _index(node: list[object], key: str, override: str) -> int:
    if not re.fullmatch(r"\d+", key) or int(key) >= len(node):
        raise RecipeError(f"override {override!r}: the list has {len(node)} entries, {key!r} is not one of them")
    return int(key)


def explain(error: ValidationError) -> Iterator[str]:
    """One short line per offending key: where, what is wrong, what was given."""
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "recipe"
        if item["type"] == "extra_forbidden":
            yield f"{where}: unknown key"
            continue
        given = item["input"]
        shown = f" (got {given!r})" if isinstance(given, str | int | float | bool | None) else ""
        yield f"{where}: {item['msg'].removeprefix('Value error, ')}{shown}"
