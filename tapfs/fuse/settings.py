"""The settings of a mount beside the image: owner and mode of its files, who may look, what it shows."""

from __future__ import annotations

import os
import stat

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.files.choice import FileSystemPlace
from tapfs.records import dataclass

#: The file in which the administrator says what users of FUSE may do.
FUSE_CONFIGURATION = "/etc/fuse.conf"

#: The umask of a mount for other users: they are to read.
_SHARED_UMASK = 0o022


@dataclass(frozen=True, slots=True)
class MountSettings:
    """`uid`, `gid` and `umask` are None where the user said nothing; `files`: show the files in there.

    `flags` are generic mount flags (suid, dev, noexec) for a file system whose files are shown. `sector_size`:
    bytes in a sector of the disk that the partition table was made on, where the user said it. `source` is the
    real name of the image, `overlay` that of the file that takes the writes, empty if that has none. `inner` are
    options for the kernel's file system whose files are shown. `faces` are formats, as images of which the disk is
    shown, too. `confined`: a program that shows files is in a sandbox.
    """

    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    files: FileSystemPlace | None = None
    flags: frozenset[str] = frozenset()
    sector_size: int | None = None
    source: str = ""
    overlay: str | None = None
    inner: tuple[str, ...] = ()
    faces: tuple[str, ...] = ()
    confined: bool = False

    @property
    def fuse_options(self) -> tuple[str, ...]:
        """What the kernel's FUSE is told: it checks the modes that the nodes show."""
        return ("default_permissions", "allow_other") if self.allow_other else ("default_permissions",)

    @property
    def owner(self) -> tuple[int, int]:
        """User and group that own the nodes of the tree."""
        uid = os.getuid() if self.uid is None else self.uid
        gid = os.getgid() if self.gid is None else self.gid
        return uid, gid

    def mode(self, mode: int) -> int:
        """The mode of a node that says `mode` itself: `umask` decides, but nothing becomes writable that was not."""
        umask = _SHARED_UMASK if self.umask is None and self.allow_other else self.umask
        if umask is None:
            return mode
        most = 0o777 if stat.S_ISDIR(mode) else 0o666
        if not mode & 0o222:
            most &= 0o555
        return stat.S_IFMT(mode) | most & ~umask

    def require_permission(self) -> None:
        """See that this user may let others in. Raises ImageError(denied)."""
        if self.allow_other and os.geteuid() != 0 and not users_may_allow_others():
            raise ImageError(
                ErrorKind.DENIED,
                "ordinary users may not say allow_other here",
                path=FUSE_CONFIGURATION,
                op="mount",
                remedy="have the administrator add the line user_allow_other",
            )


#: Nothing said.
PLAIN = MountSettings()


def for_hidden_mount() -> MountSettings:
    """How the disk is mounted whose files alone are shown: in a directory that nobody else may enter but root.

    Root is let in where that is allowed, because a FUSE program that reads the disk may be set-user-ID root.
    """
    return MountSettings(allow_other=True, umask=0o077) if users_may_allow_others() else PLAIN


def users_may_allow_others() -> bool:
    """Whether an ordinary user may let others, and so root, into what he mounts."""
    try:
        with open(FUSE_CONFIGURATION, encoding="utf-8", errors="replace") as file:
            return any(line.partition("#")[0].strip() == "user_allow_other" for line in file)
    except OSError:
        return False
