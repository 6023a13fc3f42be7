"""Archives for Linux' initramfs: cpio in the "newc" format, written without root, device nodes included.

Used while building and, inside dom0, by scenarios that give a guest files of their own.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable


class Archive:
    """One cpio archive; several of them one after the other are one initramfs."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def folder(self, *paths: str) -> None:
        for path in paths:
            self._add(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, content: bytes, permissions: int = 0o755) -> None:
        self._add(path, stat.S_IFREG | permissions, content)

    def link(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        self._add(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def content(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return b"".join(self._parts)

    def _add(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        # inode, mode, uid, gid, links, time, size, device of the file system, device of the node, name size, check
        fields: Iterable[int] = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._parts += [head, b"\0" * (-len(head) % 4), content, b"\0" * (-len(content) % 4)]
