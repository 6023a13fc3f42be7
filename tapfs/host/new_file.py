"""New files for images: complete and durable when they get their name, or not at all.

`UnnamedFile` has no name until it is published, so whatever ends the work leaves nothing half made. `InPlaceFile` is
for what cannot be replaced: a block device, or an empty file whose name cannot be given to another file. `KeptFile` is
for what is not to be replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Protocol, Self

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host import ram
from tapfs.host.file import LocalFile
from tapfs.host.target import Target

_NEW_MODE = 0o666

#: Nobody else may read a file under a hidden name before it is complete.
_HIDDEN_MODE = 0o600

_ACCESS_LIST = "system.posix_acl_access"


class NewFile(Protocol):
    """A file to be filled as an image, and then published. Unless it was, nothing of it is left at the end."""

    def __enter__(self) -> Self:
        """Make it."""
        ...

    def __exit__(self, *_: object) -> None:
        """Leave nothing of it that was not published."""
        ...

    def open(self, *, direct: bool = False) -> LocalFile:
        """The file, to be filled as an image; it is another descriptor of one open file."""
        ...

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished file its name, atomically and durably.

        What had the name when the work began is replaced. What has come to the name meanwhile is replaced only with
        `overwrite`, and only if it is not in use. Raises ImageError(exists, locked, …).
        """
        ...

    def withdraw(self) -> None:
        """Take back the name that `publish` gave, if it still is this file's."""
        ...


def new_file(target: Target, held: LocalFile | None) -> NewFile:
    """A new file for the target. `held` is what has the name now, open and locked until the new file has it.

    Raises ImageError if the name cannot be given to another file, unless `held` is empty: then it is written as it is.
    """
    if held is not None and held.is_block_device:
        return InPlaceFile(target, held)
    if held is None or held.size() > 0 or target.why_not_replaceable() is None:
        return UnnamedFile.replaceable(target, held)
    target.refuse_another_s()
    return InPlaceFile(target, held)


class UnnamedFile:
    """A new file in the target's folder that has no name, or a hidden one, until `publish`."""

    def __init__(self, target: Target, held: LocalFile | None = None) -> None:
        self._target = target
        self._held = held
        self._hidden: str | None = None
        self._descriptor = -1
        #: The permissions that it gets with its name, unless it replaces a file.
        self._mode = ram.NEW_MODE if target.location.in_memory else _NEW_MODE

    @classmethod
    def replaceable(cls, target: Target, held: LocalFile | None) -> Self:
        """One that can be published. Raises ImageError if its name cannot be given to a new file."""
        obstacle = target.why_not_replaceable()
        if obstacle is not None:
            if held is not None:
                obstacle.remedy = "empty the file first, and it is written in place"
            raise obstacle
        return cls(target, held)

    def __enter__(self) -> Self:
        try:
            self._descriptor = self._opened(".", os.O_TMPFILE, self._mode)
            self._mode = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                from tapfs.host.sandbox.confinement import explained  # most files can be made

                failed = from_os_error(error, path=self._target.path, op="create the image")
                raise explained(failed, os.path.dirname(self._target.path) or ".") from error
            try:
                self._make_hidden()
            except OSError as second:
                raise from_os_error(second, path=self._target.path, op="create the image") from second
        return self

    def __exit__(self, *_: object) -> None:
        if self._hidden is not None:
            os.unlink(self._hidden, dir_fd=self._target.folder)
        os.close(self._descriptor)

    def restrict(self, mode: int) -> None:
        """Have it named with none of the permissions that are not in `mode`."""
        self._mode &= mode

    def open(self, *, direct: bool = False) -> LocalFile:
        """See `NewFile.open`."""
        return LocalFile(self._target.path, os.dup(self._descriptor), writable=True, direct=direct)

    def publish(self, *, overwrite: bool) -> None:
        """See `NewFile.publish`."""
        with contextlib.ExitStack() as until_named:
            try:
                replaced = self._replaced(overwrite=overwrite)
                if replaced is not None and replaced is not self._held:
                    until_named.callback(replaced.close)
                self._set_permissions(replaced)
                if replaced is None:
                    self._link(self._target.name)
                else:
                    self._rename_over()
                self._target.sync()
            except OSError as error:
                raise from_os_error(error, path=self._target.path, op="name the finished image") from error

    def withdraw(self) -> None:
        """See `NewFile.withdraw`."""
        status = os.fstat(self._descriptor)
        if self._target.identity_now() == (status.st_dev, status.st_ino):
            with contextlib.suppress(OSError):
                os.unlink(self._target.name, dir_fd=self._target.folder)

    def _replaced(self, *, overwrite: bool) -> LocalFile | None:
        """What has the name now, locked, if it may be replaced; None: nothing has it."""
        there = self._target.identity_now()
        if there is None:
            return None
        if self._held is not None and self._held.identity == there:
            return self._held
        if not overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with self._target.again() as target:
            return target.open()

    def _rename_over(self) -> None:
        folder = self._target.folder
        if self._hidden is None:
            name = self._hidden_name()
            self._link(name)
            self._hidden = name
        os.rename(self._hidden, self._target.name, src_dir_fd=folder, dst_dir_fd=folder)
        self._hidden = None

    def _link(self, name: str) -> None:
        """Give the file a name that nothing has. A hidden name that it has is taken away on exit."""
        folder = self._target.folder
        if self._hidden is None:
            # With a folder descriptor given, Python follows the link in /proc: linkat(2).
            os.link(f"/proc/self/fd/{self._descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)
            return
        try:
            os.link(self._hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            # A host without hard links, such as vfat: the look before the renaming is all there is.
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or self._target.identity_now() is not None:
                raise
            os.rename(self._hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
            self._hidden = None

    def _make_hidden(self) -> None:
        """Make the file under a hidden name, and find out with which permissions the host would have made it."""
        probe = self._hidden_name()
        descriptor = self._opened(probe, os.O_CREAT | os.O_EXCL, self._mode)
        self._mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        os.unlink(probe, dir_fd=self._target.folder)
        name = self._hidden_name()
        self._descriptor = self._opened(name, os.O_CREAT | os.O_EXCL, _HIDDEN_MODE)
        self._hidden = name

    def _opened(self, name: str, flags: int, mode: int) -> int:
        return os.open(name, flags | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=self._target.folder)

    def _hidden_name(self) -> str:
        start = os.fsdecode(os.fsencode(self._target.name)[:100])
        return f".{start}.{os.urandom(4).hex()}.partial"

    def _set_permissions(self, replaced: LocalFile | None) -> None:
        """Leave a file of our own that is replaced to those who could use it before. Another's becomes ours.

        Nobody may read or write the new file who could not use the old one.
        """
        mode = self._mode
        if replaced is not None:
            status = os.fstat(replaced.descriptor)
            if status.st_uid == os.geteuid():
                with contextlib.suppress(PermissionError):
                    os.fchown(self._descriptor, -1, status.st_gid)
                _copy_access_list(replaced.descriptor, self._descriptor)
                mode = stat.S_IMODE(status.st_mode)
            else:
                mode &= status.st_mode
        # Some hosts have no permissions to set: asking for those that the file has would fail there.
        now = stat.S_IMODE(os.fstat(self._descriptor).st_mode)
        if now != mode:
            try:
                os.fchmod(self._descriptor, mode)
            except OSError as error:
                # Where a host sets none, a file that lets in fewer is no reason to lose it.
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP) or now & ~mode:
                    raise


class InPlaceFile:
    """A block device or an empty file, which becomes the image as it is.

    A file is emptied again if the work fails; one whose process is killed keeps what was written, as a device does.
    """

    def __init__(self, target: Target, held: LocalFile) -> None:
        self._path = target.path
        self._held = held
        self._published = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published and not self._held.is_block_device:
            os.ftruncate(self._held.descriptor, 0)

    def open(self, *, direct: bool = False) -> LocalFile:
        """See `NewFile.open`."""
        return self._held.duplicate(direct=direct)

    def publish(self, *, overwrite: bool) -> None:
        """Keep what was written, whatever `overwrite` says: the file has its name already."""
        del overwrite
        self._published = True

    def withdraw(self) -> None:
        """Have it emptied at the end."""
        self._published = False


class KeptFile:
    """A file that has its name and its contents already, and becomes a part of a new image with both."""

    def __init__(self, target: Target, held: LocalFile) -> None:
        self._target = target
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: whatever becomes of the image, the file stays."""

    def open(self, *, direct: bool = False) -> LocalFile:
        """See `NewFile.open`."""
        return self._held.duplicate(direct=direct)

    def publish(self, *, overwrite: bool) -> None:
        """Raise ImageError(exists) if another file has the name by now."""
        del overwrite
        if self._target.identity_now() != self._held.identity:
            message = "another file has the name by now: this one was to be kept as a part of the image"
            raise ImageError(ErrorKind.EXISTS, message, path=self._target.path, op="create", remedy="try it again")

    def withdraw(self) -> None:
        """Nothing: the name was there before."""


def _copy_access_list(source: int, target: int) -> None:
    """Give `target` the POSIX access control list of `source`, or none where that has none."""
    try:
        entries = os.getxattr(source, _ACCESS_LIST)
    except OSError:
        with contextlib.suppress(OSError):
            os.removexattr(target, _ACCESS_LIST)
        return
    os.setxattr(target, _ACCESS_LIST, entries)
