"""Requests of an operator to the process that serves a guest's disk beside those about jobs and disks in use: rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.serving.disk_requests import number, text

if TYPE_CHECKING:
    from tapfs.serving.live_jobs import LiveJobs
    from tapfs.xen.disk.held_at_rest import Holding
    from tapfs.xen.disk.stub_domains import StubDomains


async def answer(
    jobs: LiveJobs, holding: Holding, stubs: StubDomains, request: Mapping[str, Any]
) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that."""
    match request.get("command"):
        case "hold":
            await holding.hold(number(request, "seconds") or 0)
        case "release":
            return {"held": await holding.release()}
        case "serve_stub":
            domain, vdev = number(request, "domain"), number(request, "number")
            await stubs.serve(text(request, "kind"), domain or 0, vdev or 0)
        case _:
            return await jobs.answer(request)
    return {}
