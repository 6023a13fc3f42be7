"""Requests of an operator that every disk in use answers (`tapfs stats`, `pause`, `swap` and the like).

The frame of requests and answers is that of `tapfs.serving.control`. The answer comes when the thing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.asking import unknown_command

if TYPE_CHECKING:
    from tapfs.serving.disk_operations import DiskOperations


async def answer(operations: DiskOperations, request: Mapping[str, Any]) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that, and ImageError(unsupported) for another command."""
    match request.get("command"):
        case "status":
            return operations.status()
        case "statistics":
            return operations.statistics()
        case "metrics":
            return operations.metrics()
        case "pause":
            await operations.pause()
        case "resume":
            await operations.resume()
        case "swap":
            keep_names = said(request, "keep_names")
            images = await operations.swap(text(request, "file"), number(request, "size"), keep_names=keep_names)
            return {"images": images}
        case "resize":
            await operations.resize(number(request, "size"), force=said(request, "force"))
        case "limit":
            await operations.limit(limit_bytes=number(request, "bytes"), limit_requests=number(request, "requests"))
        case "scrub":
            return await operations.scrub(number(request, "offset") or 0)
        case _:
            raise unknown_command(request)
    return {}


def said(request: Mapping[str, object], name: str) -> bool:
    """Whether a request says yes to something."""
    return request.get(name) is True


def text(request: Mapping[str, object], name: str) -> str:
    """A text that a request needs. Raises ImageError(invalid_format)."""
    value = request.get(name)
    if not isinstance(value, str):
        raise ImageError(ErrorKind.INVALID_FORMAT, f"the command needs a text as {name}", op="control")
    return value


def number(request: Mapping[str, object], name: str) -> int | None:
    """A number that a request may have. Raises ImageError(invalid_format)."""
    value = request.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ImageError(ErrorKind.INVALID_FORMAT, f"the command needs a number as {name}, not {value!r}", op="control")
    return value
