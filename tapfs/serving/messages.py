"""Messages between tapfs processes: a line of JSON each, and one form of answer for success and for an ImageError."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from tapfs.errors import ErrorKind, ImageError

#: No message between tapfs processes is longer.
MESSAGE_LIMIT = 64 << 10


def error_to_data(error: ImageError) -> dict[str, object]:
    """All fields of the error, JSON-able."""
    return {
        "kind": error.kind.value,
        "message": error.message,
        "path": error.path,
        "offset": error.offset,
        "op": error.op,
        "remedy": error.neutral_remedy,
    }


def error_from_data(data: dict[str, Any]) -> ImageError:
    """The error that :func:`error_to_data` was given."""
    return ImageError(
        ErrorKind(data["kind"]),
        data["message"],
        path=data["path"],
        offset=data["offset"],
        op=data["op"],
        remedy=data["remedy"],
    )


def succeeded(fields: Mapping[str, object]) -> dict[str, object]:
    """The answer to what has been done."""
    return {"ok": True, **fields}


def failed(error: ImageError) -> dict[str, object]:
    """The answer to what could not be done."""
    return {"ok": False, **error_to_data(error)}


def result_of(line: bytes) -> dict[str, Any] | None:
    """The fields of an answer; None if the line holds none. Raises the ImageError that the answer tells of."""
    answer = decode(line)
    ok = answer.pop("ok", None)
    if ok is True:
        return answer
    try:
        error = error_from_data(answer)
    except (KeyError, ValueError):
        return None
    raise error


def encode(message: dict[str, object]) -> bytes:
    """One message, one line."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message in a line; empty if it is none."""
    try:
        message: object = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", message) if isinstance(message, dict) else {}
