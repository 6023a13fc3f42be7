"""A mount in the store of the service manager: what a keeper holds, kept for the next process of the unit.

So a mount in the foreground outlives its keeper, too. The manager starts the same command again and hands the
descriptors over. The command does not mount then; it goes on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.handover import Kept
from tapfs.serving import service_manager

if TYPE_CHECKING:
    from tapfs.disk.plan_log import PlanLog

#: Names in the store: what the last server knew, as a file in memory; the descriptors of the connection; the file
#: without a name that takes the writes of a mount with --temp.
_FACTS, _CONNECTION, _SCRATCH = "tapfs-mount", "tapfs-connection", "tapfs-scratch"


class StoredMount(NamedTuple):
    """What has come back: `plan` is the plan log's file, None if nothing is written, `token` what it holds for.

    `scratch` is the file without a name that was written.
    """

    kept: Kept
    plan: Path | None
    token: str
    scratch: int | None = None


def take_away_what_ended(left: StoredMount, mountpoint: str) -> bool:
    """Whether the files of a stored mount are gone with the program that showed them; its mount is taken away then.

    The program had the disk open, and nobody else. A server that went on would end as soon as the kernel has closed
    that for the program. So the image is mounted anew, with what the plan log has (`let_end`).
    """
    from tapfs.fuse.handover import Handover
    from tapfs.fuse.mount_table import top_mount, unmount
    from tapfs.serving.processes import process_start

    files = Handover.unpacked(left.kept.message).files
    if files is None or files.program is None or process_start(files.program[0]) == files.program[1]:
        return False
    mount = top_mount(mountpoint)
    if mount is not None and mount.device == files.device:
        unmount(mountpoint, lazy=True)
    return True


def let_end(left: StoredMount) -> None:
    """Let go of a stored mount that nobody goes on with; its image is open again, so what it had answered is there.

    The kernel ends the connection with its last descriptor. The program's end may have waited for that.
    """
    left.kept.close()
    store(None, None)


def store(kept: Kept | None, plan_log: PlanLog | None, scratch: int | None = None) -> None:
    """Have the service manager keep this in place of what it has; None: nothing."""
    for name in (_FACTS, _CONNECTION, _SCRATCH):
        service_manager.forget(name)
    if kept is None:
        return
    plan = None if plan_log is None else [str(plan_log.path), plan_log.token]
    facts = os.memfd_create(_FACTS, os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(facts), "wb") as file:
            file.write(json.dumps({"message": kept.message.decode(), "plan": plan}).encode())
        service_manager.store(_FACTS, [facts])
    finally:
        os.close(facts)
    service_manager.store(_CONNECTION, kept.connections)
    if scratch is not None:
        service_manager.store(_SCRATCH, [scratch])


def taken() -> StoredMount | None:
    """The mount that a process of this unit has left; None: there is none. Raises ImageError(io)."""
    found = service_manager.stored(_FACTS, _CONNECTION, _SCRATCH)
    if not found:
        return None
    try:
        (facts,) = found[_FACTS]
        with os.fdopen(facts, "rb") as file:
            file.seek(0)
            data = json.loads(file.read())
        plan, token = data["plan"] or (None, "")
        kept = Kept(data["message"].encode(), tuple(found[_CONNECTION]))
        scratch = next(iter(found[_SCRATCH]), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(ErrorKind.IO, f"what systemd has kept cannot be read: {error}", op="go on") from error
    return StoredMount(kept, None if plan is None else Path(plan), token, scratch)
