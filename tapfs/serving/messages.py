"""Messages between tapfs processes as JSON lines: errors to the command that started or asked a serving process."""

from __future__ import annotations

import json
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
