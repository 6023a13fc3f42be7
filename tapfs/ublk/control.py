"""Requests of an operator to the process that serves a block device beside those of every disk in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tapfs.serving import disk_requests

if TYPE_CHECKING:
    from tapfs.ublk.operations import Operations


async def answer(operations: Operations, request: Mapping[str, Any]) -> Mapping[str, object]:
    """Carry out a request. Raises what kept it from that."""
    if request.get("command") == "flush":
        await operations.flush()
        return {}
    return await disk_requests.answer(operations, request)
