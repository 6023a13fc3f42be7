"""The control socket of a disk: what `tapfs stats`, `pause`, `swap` and the like ask of the process that serves it.

A request and its answer are a JSON line each: ``{"command": "resize", "size": 1048576}``. The answer comes when the
thing is done: ``{"ok": true, …}``, or ``{"ok": false, …}`` with the fields of the ImageError.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.local_socket import receive_line
from tapfs.serving.log import log
from tapfs.serving.messages import decode, encode, error_to_data

if TYPE_CHECKING:
    from tapfs.xen.disk.operations import Operations


async def serve(listener: socket.socket, operations: Operations) -> None:
    """Answer whoever connects, until cancelled."""
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    await trio.serve_listeners(partial(_converse, operations), listeners)


async def _converse(operations: Operations, stream: trio.SocketStream) -> None:
    # Whoever asked may be gone by now.
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with stream:
            while line := await receive_line(stream):
                await stream.send_all(encode(await _answer(operations, decode(line))))


async def _answer(operations: Operations, request: Mapping[str, object]) -> dict[str, object]:
    try:
        return {"ok": True, **await _obey(operations, request)}
    except ImageError as error:
        return {"ok": False, **error_to_data(error)}
    except Exception as error:  # noqa: BLE001  the guest's disk is not to suffer from an operator's request
        log.error("internal error in a command; please report", exc_info=error)
        return {"ok": False, **error_to_data(ImageError(ErrorKind.IO, f"failed by an internal error: {error!r}"))}


async def _obey(operations: Operations, request: Mapping[str, object]) -> dict[str, object]:
    match request.get("command"):
        case "status":
            return operations.status()
        case "statistics":
            return operations.statistics()
        case "pause":
            await operations.pause()
        case "resume":
            await operations.resume()
        case "swap":
            await operations.swap(_text(request, "overlay"), _number(request, "size"))
        case "resize":
            await operations.resize(_number(request, "size"), force=request.get("force") is True)
        case "limit":
            await operations.limit(limit_bytes=_number(request, "bytes"), limit_requests=_number(request, "requests"))
        case other:
            raise ImageError(ErrorKind.UNSUPPORTED, f"unknown command {other!r}", op="control")
    return {}


def _text(request: Mapping[str, object], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str):
        raise ImageError(ErrorKind.INVALID_FORMAT, f"the command needs a text as {name}", op="control")
    return value


def _number(request: Mapping[str, object], name: str) -> int | None:
    value = request.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ImageError(ErrorKind.INVALID_FORMAT, f"the command needs a number as {name}, not {value!r}", op="control")
    return value
