"""Linux as Debian ships it, made ready: the kernel unpacked to an ELF file, its modules in order of dependency."""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

from tests.laboratory.errors import LabError


def unpack_kernel(packed: Path, kernel: Path) -> None:
    """Write the ELF file inside a bzImage, so that nothing has to decompress it under emulation.

    Fields: Linux' x86 boot protocol, setup_sects (0x1f1), payload_offset (0x248), payload_length (0x24c).
    """
    content = packed.read_bytes()
    setup_sectors = content[0x1F1] or 4
    offset, length = struct.unpack_from("<II", content, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    payload = content[begin : begin + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        image = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)
    elif payload.startswith(b"\x1f\x8b"):
        image = zlib.decompressobj(31).decompress(payload)
    else:
        raise LabError(f"{packed}: the kernel is packed in a way the laboratory does not know ({payload[:6].hex()})")
    if not image.startswith(b"\x7fELF"):
        raise LabError(f"{packed}: what it holds is not an ELF file")
    kernel.write_bytes(image)


class Modules:
    """The modules of one kernel release below `folder`/lib/modules."""

    def __init__(self, folder: Path, release: str, depmod: list[str]) -> None:
        self.folder = folder / "lib/modules" / release
        subprocess.run([*depmod, "-b", str(folder), release], check=True)
        self._needs: dict[str, list[str]] = {}
        for line in (self.folder / "modules.dep").read_text(encoding="utf-8").splitlines():
            path, _, needed = line.partition(":")
            self._needs[path] = needed.split()
        self._path = {Path(path).name.split(".")[0].replace("-", "_"): path for path in self._needs}
        built_in = (self.folder / "modules.builtin").read_text(encoding="utf-8").split()
        self._built_in = {Path(path).name.split(".")[0].replace("-", "_") for path in built_in}

    def content(self, path: str) -> bytes:
        """A module, unpacked."""
        content = (self.folder / path).read_bytes()
        return lzma.decompress(content) if path.endswith(".xz") else content

    def closure(self, names: Iterable[str]) -> list[str]:
        """Paths, relative to `folder`, of the named modules and all that they need, in the order to load them."""
        order: dict[str, None] = {}
        for name in names:
            plain = name.replace("-", "_")
            if plain in self._built_in:
                continue
            if plain not in self._path:
                raise LabError(f"Debian's kernel {self.folder.name} has no module {name}")
            path = self._path[plain]
            # depmod lists all that is needed, the innermost last.
            order.update(dict.fromkeys((*reversed(self._needs[path]), path)))
        return list(order)
