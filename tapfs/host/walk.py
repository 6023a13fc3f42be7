"""Walk a file name one component at a time, so that each step is judged before it is taken.

The kernel follows symbolic links and `..` on its own, and a caller sees only where they have led. Here each component
is opened (O_PATH) in its open folder. So what was judged is what is used afterwards, whatever happens to the names.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from tapfs.errors import ErrorKind, ImageError
from tapfs.records import NamedTuple

#: Linux follows at most so many symbolic links in one name.
_LINKS_MAX = 40

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_ENTRY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Step(NamedTuple):
    """One component of a name: `name` in the open `folder`. `status` is None if there is nothing to be seen."""

    folder: int
    name: str
    status: os.stat_result | None

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link, which is about to be followed."""
        return self.status is not None and stat.S_ISLNK(self.status.st_mode)


#: Raises OSError or ImageError if a step must not be taken.
Judge = Callable[[Step], None]


class Place(NamedTuple):
    """Where a name has led: `name`, which is no link, in a folder.

    `folder` and `entry` are O_PATH descriptors of whoever has the place. `entry` is None if nothing is there.
    """

    folder: int
    name: str
    entry: int | None

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.folder)
        if self.entry is not None:
            os.close(self.entry)


def path_of(descriptor: int) -> str:
    """The name that an open file or folder has now, without symbolic links."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def walk(path: str, judge: Judge, *, base: str = ".") -> Place:
    """The place that `path` names. A relative path starts at the folder `base`, which is not judged.

    A file that is missing at the end is no error. Raises OSError as the kernel would, and whatever `judge` raises.
    """
    walking = _Walk(path, judge, base)
    try:
        return walking.arrive()
    except BaseException:
        os.close(walking.folder)
        raise


class _Walk:
    """A walk that has come to `folder`, and the components that are still to be taken, the next one last."""

    def __init__(self, path: str, judge: Judge, base: str) -> None:
        self._path = path
        self._judge = judge
        self._links = 0
        self._todo = _components(path)
        self.folder = os.open("/" if path.startswith("/") else base, _FOLDER)

    def arrive(self) -> Place:
        """Take every step."""
        while self._todo:
            name = self._todo.pop()
            if name in {".", ".."}:
                self._enter(os.open(name, _FOLDER, dir_fd=self.folder))
                continue
            entry, is_link = self._look(name)
            if is_link and entry is not None:
                self._follow(name, entry)
            elif not self._todo:
                return Place(self.folder, name, entry)
            elif entry is None:
                raise self._error(errno.ENOENT)
            else:
                os.close(entry)
                # Opened as a folder: unlike a look, that has an automounter mount what belongs there.
                self._enter(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.folder))
        raise self._error(errno.EISDIR)

    def _look(self, name: str) -> tuple[int | None, bool]:
        """The entry of a name (O_PATH; None: it is missing), once it was judged, and whether it is a link."""
        try:
            entry = os.open(name, _ENTRY, dir_fd=self.folder)
        except OSError as error:
            self._judge(Step(self.folder, name, None))
            if isinstance(error, FileNotFoundError):
                return None, False
            raise
        try:
            step = Step(self.folder, name, os.fstat(entry))
            self._judge(step)
        except BaseException:
            os.close(entry)
            raise
        return entry, step.is_link

    def _follow(self, name: str, link: int) -> None:
        try:
            self._links += 1
            if self._links > _LINKS_MAX:
                raise self._error(errno.ELOOP)
            if _is_in_proc(link) and name != "self":
                self._enter(self._open_file_of_a_process(name))
                return
            target = os.readlink("", dir_fd=link)
        finally:
            os.close(link)
        self._todo += _components(target)
        if target.startswith("/"):
            self._enter(os.open("/", _FOLDER))

    def _open_file_of_a_process(self, name: str) -> int:
        """The folder behind a link like /proc/self/fd/5, which leads to an open file and not to a name."""
        try:
            return os.open(name, _FOLDER, dir_fd=self.folder)
        except NotADirectoryError:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "is an open file or a stream of a process; an image is made under a name of its own",
                path=self._path,
                op="create",
                remedy="name a file",
            ) from None

    def _enter(self, folder: int) -> None:
        os.close(self.folder)
        self.folder = folder

    def _error(self, number: int) -> OSError:
        return OSError(number, os.strerror(number), self._path)


def _components(path: str) -> list[str]:
    """The components of a name, the last one first. A slash at the end asks for a folder, as `.` does."""
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    parts = path.split("/")
    inner = [part for part in parts[:-1] if part not in {"", "."}]
    return [parts[-1] or ".", *reversed(inner)]


def _is_in_proc(link: int) -> bool:
    return os.fstat(link).st_dev == os.stat("/proc/self", follow_symlinks=False).st_dev
