"""Requests of an operator to the process that serves a block device beside those about jobs and disks in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapfs.serving.live_jobs import LiveJobs
    from tapfs.ublk.operations import Operations


async def answer(operations: Operations, jobs: LiveJobs, request: Mapping[str, Any]) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that."""
    if request.get("command") == "flush":
        await operations.flush()
        return {}
    if request.get("command") == "give_up":
        await operations.give_up()
        return {}
    return await jobs.answer(request)
