"""The target of a new image: a name in an open folder, and the file that has the name already.

Other users may be able to change the folder, as everybody can /tmp. So the name is walked once, and each link on
the way is judged. All later steps are done in the open folder, with a name that was no link. The rules are those of
Linux (fs.protected_symlinks, fs.protected_regular), whatever the host is set to.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Self

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host import ram
from tapfs.host.file import LocalFile
from tapfs.host.location import Location
from tapfs.host.walk import Place, Step, path_of, walk

_CREATE = "create the image"

#: The number of CAP_FOWNER, with which files of others in a sticky folder may be replaced.
_CAP_FOWNER = 3


class Target:
    """The place of a file that is to be made, replaced, or written as it is.

    Raises ImageError: not_found if its folder is missing, denied if another user could have chosen where it leads.
    """

    def __init__(self, location: Location, *, base: str = ".") -> None:
        """`base` is the folder in which a relative name starts."""
        self.location = location
        self._base = base
        self._place = self._walked()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._place.close()

    @property
    def path(self) -> str:
        """The name for messages."""
        return self.location.name

    @property
    def folder(self) -> int:
        """An O_PATH descriptor of the folder."""
        return self._place.folder

    @property
    def name(self) -> str:
        """The name in the folder."""
        return self._place.name

    @property
    def is_there(self) -> bool:
        """Whether a file had the name when it was looked at."""
        return self._place.entry is not None

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file that had the name when it was looked at."""
        if self._place.entry is None:
            return None
        status = os.fstat(self._place.entry)
        return status.st_dev, status.st_ino

    def identity_now(self) -> tuple[int, int] | None:
        """Device and inode of what has the name now: it may be another file, or a link."""
        try:
            status = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def open(self, *, direct: bool = False) -> LocalFile:
        """The file that had the name, open for writing and locked. Raises ImageError(locked, denied, …)."""
        entry = self._place.entry
        if entry is None:
            raise from_os_error(FileNotFoundError(errno.ENOENT, ""), path=self.path, op="open the image")
        try:
            return LocalFile.open_found(entry, self.path, writable=True, direct=direct)
        except ImageError as error:
            if error.kind is ErrorKind.INVALID_FORMAT and not stat.S_ISDIR(os.fstat(entry).st_mode):
                error.remedy = "name a file: an image is written in any order, which no stream takes"
            raise

    def sync(self) -> None:
        """Make what was done to names in the folder durable. Raises OSError."""
        try:
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.folder)
        except PermissionError:
            os.sync()  # a folder that may be written and not be read
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def again(self) -> Target:
        """The same name, looked at anew."""
        return Target(self.location, base=self._base)

    def beside(self, name: str) -> Target:
        """Another name in the same folder, or below it. It may be used as long as this one is open."""
        path = os.path.join(os.path.dirname(self.path), name)
        return Target(Location(path, name), base=f"/proc/self/fd/{self.folder}")

    def refuse_another_s(self) -> None:
        """Raise ImageError(denied) for another's file where everybody can make files: it may be there for our data."""
        if self._place.entry is None:
            return
        folder, status = os.fstat(self.folder), os.fstat(self._place.entry)
        if _is_for_everybody(folder) and status.st_uid not in {os.geteuid(), folder.st_uid}:
            raise ImageError(
                ErrorKind.DENIED,
                f"belongs to user {status.st_uid}, in a folder where everybody may make files",
                path=self.path,
                op=_CREATE,
                remedy="name a file of your own",
            )

    def why_not_replaceable(self) -> ImageError | None:
        """What keeps another file from getting the name, if anything does; found before a long copy, not after it."""
        if not os.access(f"/proc/self/fd/{self.folder}", os.W_OK | os.X_OK, effective_ids=True):
            return self._obstacle(ErrorKind.DENIED, f"its folder {path_of(self.folder)} may not be written")
        if self._place.entry is None:
            return None
        if _mount_of(self.folder) != _mount_of(self._place.entry):
            return self._obstacle(ErrorKind.LOCKED, "it is a mount point, so its name cannot be given to another file")
        folder, status = os.fstat(self.folder), os.fstat(self._place.entry)
        owners = {folder.st_uid, status.st_uid}
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in owners and not _has_capability(_CAP_FOWNER):
            return self._obstacle(
                ErrorKind.DENIED, f"it belongs to user {status.st_uid}, in a folder where only they may replace it"
            )
        return None

    def _obstacle(self, kind: ErrorKind, reason: str) -> ImageError:
        return ImageError(kind, f"cannot {_CREATE}: {reason}", path=self.path, op=_CREATE)

    def _walked(self) -> Place:
        try:
            return walk(self.location.host_path, self._judge, base=self._base)
        except FileNotFoundError as error:
            message = f"cannot {_CREATE}: its folder does not exist"
            raise ImageError(ErrorKind.NOT_FOUND, message, path=self.path, op=_CREATE) from error
        except IsADirectoryError as error:
            message = "is a directory, not a disk image"
            raise ImageError(ErrorKind.INVALID_FORMAT, message, path=self.path, op=_CREATE) from error
        except OSError as error:
            raise from_os_error(error, path=self.path, op=_CREATE) from error
        except ValueError as error:
            raise ImageError(
                ErrorKind.NOT_FOUND, f"is no file name: {error}", path=repr(self.path), op="open"
            ) from error

    def _judge(self, step: Step) -> None:
        if step.status is None:
            return
        if self.location.in_memory and step.name == os.path.basename(self.location.host_path):
            ram.judge(step.status, self.path)
        if not step.is_link:
            return
        folder = os.fstat(step.folder)
        if _is_for_everybody(folder) and step.status.st_uid not in {os.geteuid(), folder.st_uid}:
            link = os.path.join(path_of(step.folder), step.name)
            raise ImageError(
                ErrorKind.DENIED,
                f"the symbolic link {link} belongs to user {step.status.st_uid}, in a folder where everybody may make"
                " links; it is not followed",
                path=self.path,
                op=_CREATE,
                remedy="name the file that it leads to, if you trust it",
            )


def _is_for_everybody(folder: os.stat_result) -> bool:
    """Whether a folder is one like /tmp: sticky, and writable by everybody."""
    return bool(folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH)


def _mount_of(descriptor: int) -> str | None:
    """The number of the mount through which a descriptor was opened."""
    with open(f"/proc/self/fdinfo/{descriptor}") as lines:
        return next((line for line in lines if line.startswith("mnt_id:")), None)


def _has_capability(number: int) -> bool:
    """Whether this process has a capability in effect."""
    with open("/proc/self/status") as lines:
        held = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(held >> number & 1)
