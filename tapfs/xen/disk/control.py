"""Requests of an operator to the process that serves a guest's disk beside those about jobs and disks in use: rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.serving.disk_requests import number

if TYPE_CHECKING:
    from tapfs.serving.live_jobs import LiveJobs
    from tapfs.xen.disk.held_at_rest import Holding


async def answer(jobs: LiveJobs, holding: Holding, request: Mapping[str, Any]) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that."""
    match request.get("command"):
        case "hold":
            await holding.hold(number(request, "seconds") or 0)
        case "release":
            return {"held": await holding.release()}
        case _:
            return await jobs.answer(request)
    return {}
