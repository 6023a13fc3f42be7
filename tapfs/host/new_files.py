"""The new host files of one image: without a name until all of them are complete, then named, the image last.

A program finds an image by the image's own name. That name is given last, so the files that the image names are there
by then. Where an image of several files replaces another, the old image loses its name first. A crash in between
leaves no image, and never a mixture of both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from typing import Self

from tapfs.errors import from_os_error
from tapfs.host.file import LocalFile
from tapfs.host.new_file import KeptFile, NewFile, UnnamedFile, new_file
from tapfs.host.target import Target


class NewFiles:
    """A context: new files for some targets, the image first; all of them appear at `publish`, or none.

    `held` has for each target what has the name now, open and locked until the new file has it, or None. An image of
    one file may be written in place (`tapfs.host.new_file`). Raises ImageError if a name cannot be given to a new file.
    What is held under one of the names `kept` stays, contents and all.
    """

    def __init__(self, targets: Sequence[Target], held: Sequence[LocalFile | None], kept: Collection[str] = ()) -> None:
        self._target = targets[0]
        if len(targets) == 1:
            self._files: list[NewFile] = [new_file(targets[0], held[0])]
        else:
            self._files = [
                KeptFile(target, file)
                if file is not None and target.name in kept
                else UnnamedFile.replaceable(target, file)
                for target, file in zip(targets, held, strict=True)
            ]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as entered:
            for file in self._files:
                entered.enter_context(file)
            self._stack = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self) -> list[LocalFile]:
        """Other descriptors of the files, the image first, to be filled; they are the caller's."""
        with contextlib.ExitStack() as on_error:
            files: list[LocalFile] = []
            for new in self._files:
                files.append(new.open())
                on_error.callback(files[-1].close)
            on_error.pop_all()
        return files

    def publish(self, *, overwrite: bool) -> None:
        """Give the finished files their names, durably: the further ones first, the image last.

        What came to one of the names meanwhile stays unless `overwrite`, and ImageError(exists) is raised; the
        further files that have a name by then lose it again.
        """
        image, *further = self._files
        if further and overwrite:
            self._unname()
        named: list[NewFile] = []
        try:
            for file in (*further, image):
                file.publish(overwrite=overwrite)
                named.append(file)
        except BaseException:
            for file in named:
                file.withdraw()
            raise

    def _unname(self) -> None:
        """Take the name of the old image away, durably, if there is one."""
        try:
            os.unlink(self._target.name, dir_fd=self._target.folder)
            self._target.sync()
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, path=self._target.path, op="replace the old image") from error
