"""Requests of an operator to the process that serves a disk beside those of every disk in use: live jobs and rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.serving import disk_requests
from tapfs.serving.disk_requests import number, said, text

if TYPE_CHECKING:
    from tapfs.xen.disk.held_at_rest import Holding
    from tapfs.xen.disk.live_jobs import LiveJobs
    from tapfs.xen.disk.operations import Operations


async def answer(
    operations: Operations, jobs: LiveJobs, holding: Holding, request: Mapping[str, Any]
) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that."""
    match request.get("command"):
        case "commit":
            return await jobs.commit(rate=number(request, "rate"), keep_names=said(request, "keep_names"))
        case "mirror":
            return await jobs.mirror(
                text(request, "file"),
                text(request, "format"),
                rate=number(request, "rate"),
                overwrite=said(request, "overwrite"),
                pivot=said(request, "pivot"),
                keep_names=said(request, "keep_names"),
            )
        case "hold":
            await holding.hold(number(request, "seconds") or 0)
        case "release":
            return {"held": await holding.release()}
        case "job":
            return jobs.status()
        case "cancel":
            jobs.cancel()
        case _:
            return await disk_requests.answer(operations, request)
    return {}
