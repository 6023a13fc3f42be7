"""The new host files of one image: without a name until all of them are complete, then named, the image last.

An image is found by its own name, so that comes last: whoever finds it finds the files that it names. Where an image of
several files replaces another, the old image loses its name first. A crash in between leaves no image, never a mixture.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Self

from tapfs.errors import from_os_error
from tapfs.host.file import LocalFile
from tapfs.host.unnamed_file import UnnamedFile


class NewFiles:
    """A context: the file `target` and those called `further` in its folder; all appear at `publish`, or none."""

    def __init__(self, path: str, target: str, further: Sequence[str] = ()) -> None:
        """`path` is what messages call the image."""
        folder = os.path.dirname(target)
        self._path = path
        self._target = target
        self._image = UnnamedFile(path, target)
        self._further = [UnnamedFile(name, os.path.join(folder, name)) for name in further]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as entered:
            for file in (self._image, *self._further):
                entered.enter_context(file)
            self._stack = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> list[LocalFile]:
        """Other descriptors of the files, the image first, to be filled; they are the caller's."""
        with contextlib.ExitStack() as on_error:
            files: list[LocalFile] = []
            for unnamed in (self._image, *self._further):
                files.append(unnamed.open())
                on_error.callback(files[-1].close)
            on_error.pop_all()
        return files

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished files their names, durably: the further ones first, the image last.

        Unless `overwrite` a file that came to one of the names meanwhile stays, and ImageError(exists) is raised; the
        further files that have a name by then lose it again.
        """
        if self._further and overwrite:
            with contextlib.suppress(FileNotFoundError):
                self._unname()
        named: list[UnnamedFile] = []
        try:
            for file in (*self._further, self._image):
                file.publish(overwrite=overwrite)
                named.append(file)
        except BaseException:
            for file in named:
                file.withdraw()
            raise

    def _unname(self) -> None:
        """Take the name of the old image away, durably."""
        try:
            os.unlink(self._target)
            folder = os.open(os.path.dirname(self._target), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise from_os_error(error, path=self._path, op="replace the old image") from error
