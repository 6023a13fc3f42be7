"""The host file of an open raw image, as a disk that refuses writes for a while."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from tapfs.disk.image import Image


class FailingFile:
    """While it fails the descriptor of the image cannot write: the engine gets EBADF, an error of the disk."""

    def __init__(self, image: Image) -> None:
        descriptor = image.whole_file()
        assert descriptor is not None
        self._descriptor = descriptor
        self._works = os.dup(descriptor)
        self._fails = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mend()
        os.close(self._works)
        os.close(self._fails)

    def fail(self) -> None:
        """Refuse writes from now on."""
        os.dup2(self._fails, self._descriptor, inheritable=False)

    def mend(self) -> None:
        """Take them again."""
        os.dup2(self._works, self._descriptor, inheritable=False)
