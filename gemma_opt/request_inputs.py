"""`-i name=value` on the command line → a Request, as `cog predict` reads it.

`@file` reads a local file: a picture becomes a data URI, JSON of messages its value. This is the only place that opens
a path for a request, because here the user and the machine's owner are one.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from gemma_opt.errors import ImageError, ParameterError
from gemma_opt.service import Request

_LISTS = ("images", "stop_sequences")
_PICTURES = ("image", "images")


def read_inputs(pairs: Sequence[str]) -> Request:
    """Parse and check `name=value` pairs. Repeat images and stop_sequences for several. Raises InputError."""
    names = [field.name for field in fields(Request)]
    values: dict[str, object] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or name not in names:
            raise ParameterError(f"-i {pair!r} is not NAME=VALUE with one of the names {', '.join(names)}")
        value = _value(name, text)
        if name in _LISTS:
            previous = values.get(name, [])
            values[name] = [*previous, value] if isinstance(previous, list) else [value]
        elif name in values:
            raise ParameterError(f"{name} is given twice")
        else:
            values[name] = value
    try:
        return TypeAdapter(Request).validate_python(values)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, item['loc'][:1]))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise ParameterError("; ".join(dict.fromkeys(wrong))) from None


def _value(name: str, text: str) -> object:
    if name in _PICTURES:
        return _picture(text[1:]) if text.startswith("@") else text
    if name in ("prompt", "messages") and text.startswith("@"):
        text = _text(name, text[1:])
    return _messages(text) if name == "messages" else text


def _text(name: str, path: str) -> str:
    try:
        return _read_file(path).decode("utf-8")
    except OSError as error:
        raise ParameterError(f"{name}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ParameterError(f"{name}: {path} is not UTF-8 text") from None


def _picture(path: str) -> str:
    try:
        content = _read_file(path)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from None
    return "data:application/octet-stream;base64," + base64.b64encode(content).decode()


def _messages(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise ParameterError(f"messages are not JSON: {error}") from None


def _read_file(path: str) -> bytes:
    return Path(path).expanduser().read_bytes()
