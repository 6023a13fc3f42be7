"""VMDKs of every kind that can be written, in files in memory: the second writer's, and those that `create` makes."""

from __future__ import annotations

import random

from tapfs.testing.model import MemoryFile
from tests.vmdk_images import cowd, descriptor, hosted, monolithic, random_grains, sectors

_GRAIN = 16 * 512

#: Kind: whether it is over a parent.
KINDS: dict[str, bool] = {
    "monolithic": False,
    "monolithic-delta": True,
    "monolithic-no-redundant": False,
    "monolithic-tables-left-out": True,
    "zeroed": False,
    "zeroed-delta": True,
    "unclean": False,
    "unaligned": True,
    "split": False,
    "split-delta": True,
    "flat": False,
    "flat-parts": False,
    "flat-beside-sparse": False,
    "cowd": False,
    "cowd-delta": True,
}


def make(kind: str, size: int, seed: int) -> tuple[MemoryFile, bytes]:
    """A disk of a kind with some data in it, and the bytes of its parent."""
    choice = random.Random(seed)
    parent = choice.randbytes(size * 3 // 4) if KINDS[kind] else b""
    over = {"parent_cid": 7, "hint": "parent.vmdk"} if KINDS[kind] else {}
    what, *_ = kind.split("-")
    grains = random_grains(choice, size, _GRAIN, zeros=what == "zeroed")
    if what in {"monolithic", "zeroed", "unclean", "unaligned"}:
        content = monolithic(
            grains,
            size,
            redundant=not kind.endswith("no-redundant"),
            all_tables=not kind.endswith("left-out"),
            unclean=int(what == "unclean"),
            flags=None if what != "zeroed" else 7,
            **over,
        )
        # A file that ends beside its sectors.
        return MemoryFile(content + bytes(700) if what == "unaligned" else content), parent
    files, lines = _parts(what, kind, size, choice)
    text = descriptor(lines, create_type="custom", **over)  # type: ignore[arg-type]
    return MemoryFile(text, "disk.vmdk", {name: MemoryFile(data, name) for name, data in files.items()}), parent


def _parts(what: str, kind: str, size: int, choice: random.Random) -> tuple[dict[str, bytes], list[str]]:
    """The files beside the descriptor, and its lines."""
    cut = size // 2 // 65536 * 65536
    if what == "cowd":
        return {"c": cowd(random_grains(choice, size, 512), size)}, [f'RW {sectors(size)} VMFSSPARSE "c"']
    if kind == "flat":
        return {"f": choice.randbytes(size)}, [f'RW {sectors(size)} FLAT "f"']
    if kind == "flat-parts":
        files = {"f": choice.randbytes(size + 1024), "g": choice.randbytes(size)}
        return files, ['RW 77 FLAT "f" 2', f'RW {sectors(size) - 77} FLAT "g"']
    first = hosted(random_grains(choice, cut, _GRAIN), cut)
    if kind == "flat-beside-sparse":
        return {"s": first, "f": choice.randbytes(size)}, [
            f'RW {sectors(cut)} SPARSE "s"',
            f'RW {sectors(size - cut)} FLAT "f" 1',
        ]
    rest = size - cut
    return {"s": first, "t": hosted(random_grains(choice, rest, _GRAIN), rest)}, [
        f'RW {sectors(cut)} SPARSE "s"',
        f'RW {sectors(rest)} SPARSE "t"',
    ]
