"""The control of disks that `tapfs serve` serves: each disk has a record and a control socket while it is served.

Beside the requests that every disk in use answers there is `stop`. It is answered when the images are closed, with what
was met on the way there in `error`. A server that is used stays, unless `force` is said.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving import disk_requests
from tapfs.serving.log import log, tell_served
from tapfs.serving.messages import error_to_data
from tapfs.serving.processes import process_start
from tapfs.serving.served_operations import OpenedBy, ServedDisk, ServedOperations
from tapfs.serving.served_record import ServedRecord, own_directory, remove_record, write_record
from tapfs.serving.service import Service

if TYPE_CHECKING:
    import trio

    from tapfs.disk.plan_log import PlanLog


class ServedControl:
    """The records and control sockets of the disks of one server, from `add` to the end of the service.

    `door`: "nbd" or "vhost-user". Where the host has no room for them the disks are served all the same.
    """

    def __init__(self, service: Service, door: str) -> None:
        self._service = service
        self._door = door
        self._all: list[ServedOperations] = []
        self._directory: Path | None = None
        try:
            self._directory = own_directory()
        except ImageError as error:
            log.warning("the disk will not be listed, nor can it be controlled: %s", error)

    def add(
        self,
        disk: ServedDisk,
        changing: trio.Lock,
        *,
        name: str,
        addresses: Sequence[str],
        opened: OpenedBy,
        announce: Callable[[], Awaitable[None]],
        plan_log: PlanLog | None = None,
    ) -> None:
        """Show a disk, and answer for it from now on; while `serve` of the service runs. Raises ImageError."""
        image, pid = disk.image, os.getpid()
        shown = image.layers[1 if image.temporary else 0]
        record = ServedRecord(
            pid,
            process_start(pid) or 0,
            len(self._all),
            self._door,
            tuple(addresses),
            name,
            shown.path,
            shown.driver.format_name,
            "w" if image.writable else "r",
        )
        if not self._all:
            tell_served(image=record.path, disk=record.address)
        operations = ServedOperations(
            self._service,
            disk,
            record,
            changing,
            directory=self._directory,
            opened=opened,
            announce=announce,
            plan_log=plan_log,
        )
        self._all.append(operations)
        ending = self._service.ending
        if self._directory is not None:
            ending.add("remove the record of the disk", partial(remove_record, self._directory, record))
            write_record(self._directory, record)
            self._service.listen(self._directory, record.socket_name, partial(self._answer, operations))
        ending.add_async("wait for an operation", changing.acquire)

    async def _answer(self, operations: ServedOperations, request: Mapping[str, Any]) -> Mapping[str, object]:
        if request.get("command") != "stop":
            return await disk_requests.answer(operations, request)
        clients = sum(each.clients for each in self._all)
        if clients and not disk_requests.said(request, "force"):
            raise ImageError(
                ErrorKind.LOCKED,
                f"is in use by {clients} client{'s' if clients > 1 else ''}",
                path=self._service.path,
                op="end the server",
                remedy="say {force} if their connections may end",
            )
        error = await operations.stop()
        return {"error": None if error is None else error_to_data(error)}
