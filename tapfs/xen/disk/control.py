"""Requests of an operator to the process that serves a disk (`tapfs stats`, `pause`, `swap` and the like).

The frame of requests and answers is that of `tapfs.serving.control`. The answer comes when the thing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.asking import unknown_command

if TYPE_CHECKING:
    from tapfs.xen.disk.held_at_rest import Holding
    from tapfs.xen.disk.live_jobs import LiveJobs
    from tapfs.xen.disk.operations import Operations


async def answer(
    operations: Operations, jobs: LiveJobs, holding: Holding, request: Mapping[str, Any]
) -> Mapping[str, object]:
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
        case "swap":
            keep_names = request.get("keep_names") is True
            images = await operations.swap(_text(request, "file"), _number(request, "size"), keep_names=keep_names)
            return {"images": images}
        case "resize":
            await operations.resize(_number(request, "size"), force=request.get("force") is True)
        case "commit":
            return await jobs.commit(rate=_number(request, "rate"), keep_names=request.get("keep_names") is True)
        case "mirror":
            return await jobs.mirror(
                _text(request, "file"),
                _text(request, "format"),
                rate=_number(request, "rate"),
                overwrite=request.get("overwrite") is True,
                pivot=request.get("pivot") is True,
                keep_names=request.get("keep_names") is True,
            )
        case "hold":
            await holding.hold(_number(request, "seconds") or 0)
        case "release":
            return {"held": await holding.release()}
        case "job":
            return jobs.status()
        case "cancel":
            jobs.cancel()
        case "limit":
            await operations.limit(limit_bytes=_number(request, "bytes"), limit_requests=_number(request, "requests"))
        case _:
            raise unknown_command(request)
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
