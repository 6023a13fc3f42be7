"""The file with the number of a process that serves: opened before the sandbox, written when clients may come.

Another user may be able to put a link into its folder, as everybody can into /tmp. So its name is walked as that of a
new image is (`tapfs.host.target`), and the file is not looked up a second time.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.location import Location
from tapfs.host.target import Target

_OPERATION = "write the number of the process"

#: A file that holds more than this is none that has a process's number in it.
_MOST_OF_A_NUMBER = 32


class PidFile:
    """A file that is new, or empty, or has held a number and nothing else."""

    def __init__(self, path: str) -> None:
        """Open it, without a number yet. Raises ImageError(exists, denied, not_found, …)."""
        self.path = os.path.abspath(path)
        try:
            with Target(Location(path, self.path)) as target:
                target.refuse_another_s()
                self._is_ours = not target.is_there
                self._descriptor = _opened(target)
        except ImageError as error:
            error.op = _OPERATION
            raise
        except OSError as error:
            raise from_os_error(error, path=path, op=_OPERATION) from error
        if not _holds_number(self._descriptor):
            os.close(self._descriptor)
            message, remedy = "is there already, and holds no number of a process", "remove it, or name another file"
            raise ImageError(ErrorKind.EXISTS, message, path=self.path, op=_OPERATION, remedy=remedy)
        #: Where the file is, also behind a link of the user's.
        self.place = os.readlink(f"/proc/self/fd/{self._descriptor}")

    def write(self) -> None:
        """Write the number of this process. Raises ImageError."""
        self._is_ours = True
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise from_os_error(error, path=self.path, op=_OPERATION) from error

    def remove(self) -> None:
        """Remove it, unless another has its name by now, or it was there and this server has not come to serve."""
        if not self._is_ours:
            return
        with suppress(OSError):
            ours, named = os.fstat(self._descriptor), os.lstat(self.place)
            if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
                os.unlink(self.place)


def _opened(target: Target) -> int:
    # Whoever writes it chooses which process is ended by it: it is its owner's alone to write, whatever the umask.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    flags |= 0 if target.is_there else os.O_CREAT | os.O_EXCL
    return os.open(target.name, flags, 0o644, dir_fd=target.folder)


def _holds_number(descriptor: int) -> bool:
    """Whether a regular file is empty or has a number in decimal and nothing else."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    content = os.pread(descriptor, _MOST_OF_A_NUMBER, 0).strip()
    return not content or content.isdigit()
