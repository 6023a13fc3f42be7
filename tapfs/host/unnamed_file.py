"""New files that have no name until they are complete: whatever ends the work leaves nothing half made."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from typing import Self

from tapfs.errors import from_os_error
from tapfs.host.file import LocalFile


class UnnamedFile:
    """A new file in the target's folder that has no name, or a hidden one, until `publish`."""

    def __init__(self, path: str, target: str) -> None:
        self._path = path
        self._target = target
        self._folder = os.path.dirname(target)
        self._hidden: str | None = None
        self._descriptor = -1
        #: The empty file that has the name already, if there is one: it may be replaced.
        self._empty = _empty_file(target)

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self._folder, os.O_TMPFILE | os.O_RDWR, 0o666)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise from_os_error(error, path=self._path, op="create the image") from error
            self._hidden = self._hidden_name()
            try:
                self._descriptor = os.open(self._hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            except OSError as second:
                self._hidden = None
                raise from_os_error(second, path=self._path, op="create the image") from second
        return self

    def __exit__(self, *_: object) -> None:
        if self._hidden is not None:
            os.unlink(self._hidden)
        os.close(self._descriptor)

    def open(self, *, direct: bool = False) -> LocalFile:
        """The file, to be filled as an image; it is another descriptor of the same open file."""
        return LocalFile(self._path, os.dup(self._descriptor), writable=True, direct=direct)

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished file its name, atomically and durably.

        Unless `overwrite` a file that came to that name meanwhile stays, and ImageError(exists)
        is raised; an empty one that was there from the start is replaced.
        """
        try:
            replace = overwrite or (self._empty is not None and self._empty == _empty_file(self._target))
            if replace and os.path.lexists(self._target):
                self._copy_permissions()
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if replace:
                    if self._hidden is None:
                        name = self._hidden_name()
                        self._link(name, folder)
                        self._hidden = name
                    os.rename(self._hidden, self._target)
                    self._hidden = None
                else:
                    self._link(self._target, folder)
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise from_os_error(error, path=self._path, op="name the finished image") from error

    def withdraw(self) -> None:
        """Take back the name that `publish` gave, if it still is this file's."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._target), os.fstat(self._descriptor)):
                os.unlink(self._target)

    def _link(self, name: str, folder: int) -> None:
        """Give the file a name that nothing has. A hidden name that it has is taken away on exit."""
        if self._hidden is None:
            # With a folder descriptor given, Python follows the link in /proc: linkat(2).
            os.link(f"/proc/self/fd/{self._descriptor}", name, src_dir_fd=folder, follow_symlinks=True)
            return
        try:
            os.link(self._hidden, name)
        except OSError as error:
            # A host without hard links, such as vfat: the look before the renaming is all there is.
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or os.path.lexists(name):
                raise
            os.rename(self._hidden, name)
            self._hidden = None

    def _hidden_name(self) -> str:
        name = f".{os.path.basename(self._target)[:200]}.{secrets.token_hex(4)}.partial"
        return os.path.join(self._folder, name)

    def _copy_permissions(self) -> None:
        """Who replaces a file leaves it to those who could use it before."""
        status = os.stat(self._target)
        with contextlib.suppress(PermissionError):
            os.fchown(self._descriptor, status.st_uid, status.st_gid)
        os.fchmod(self._descriptor, stat.S_IMODE(status.st_mode))


def _empty_file(path: str) -> tuple[int, int] | None:
    """Device and inode of the empty regular file at `path`; None if there is no such file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) and status.st_size == 0 else None
