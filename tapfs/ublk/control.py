"""Requests of an operator to the process that serves a block device (`tapfs stats`, `pause`, `swap` and the like).

The frame of requests and answers is that of `tapfs.serving.control`. The answer comes when the thing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.serving.asking import unknown_command

if TYPE_CHECKING:
    from tapfs.ublk.operations import Operations


async def answer(operations: Operations, request: Mapping[str, Any]) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that."""
    match request.get("command"):
        case "status":
            return operations.status()
        case "statistics":
            return operations.statistics()
        case "pause":
            await operations.pause()
        case "resume":
            await operations.resume()
        case "flush":
            await operations.flush()
        case "swap":
            images = await operations.swap(request["file"], request["size"], keep_names=request["keep_names"])
            return {"images": images}
        case "resize":
            await operations.resize(request["size"], force=request["force"])
        case "limit":
            await operations.limit(limit_bytes=request["bytes"], limit_requests=request["requests"])
        case _:
            raise unknown_command(request)
    return {}
