"""Mutations of sound images: fields and entries at their edges, tables that are swapped or cut, lost ends, bits, text.

Checksums that a mutation breaks are made true again in most images, as a hostile writer would.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from tapfs.checksums import crc32c
from tapfs.testing.hostile import EDGES, damage
from tests.peer.differential.places import Place, Places, places, unpacked_tables
from tests.peer.differential.seeds import Seed, seeds
from tests.peer.qcow2_damage.anatomy import Anatomy
from tests.peer.qcow2_damage.damages import DAMAGES
from tests.peer.qcow2_damage.sound import IMAGE

Files = dict[str, bytearray]
_MOST_ITERATIONS = 20_000


class Mutated(NamedTuple):
    """A mutated image: the seed, what was done to it in words, and its files."""

    seed: Seed
    what: str
    files: dict[str, bytes]


@cache
def _places(name: str) -> list[Places]:
    return [places(name, seed) for seed in seeds(name)]


def mutated(name: str, number: int) -> Mutated:
    """The mutation of that number of images of a format."""
    choice = random.Random(f"{name} {number}")
    index = choice.randrange(len(seeds(name)))
    seed = seeds(name)[index]
    files = {file: bytearray(content) for file, content in seed.files.items()}
    chosen = choice.choices(_MUTATIONS, _WEIGHTS, k=choice.choice([1, 1, 1, 1, 2, 3]))
    if _text in chosen:  # it looks at what it changes, which must be sound
        chosen = [_text, *(mutate for mutate in chosen if mutate is not _text)]
    done = [mutate(name, files, _places(name)[index], choice) for mutate in chosen]
    if choice.random() < 0.85:
        make_true(name, files[IMAGE])
    if name == "luks":
        _few_iterations(files[IMAGE])
    return Mutated(seed, "; ".join(filter(None, done)), {file: bytes(data) for file, data in files.items()})


def _edge(files: Files, place: Place, known: Places, choice: random.Random) -> int:
    """A number at the edge of what a field may hold, of what it holds, or of what others mean."""
    now = place.get(files)
    other = choice.choice(known.fields or [place])
    length = len(files[place.file]) or 1
    return choice.choice(
        [
            *(now + 1, now - 1, now * 2, now // 2, now ^ 1 << choice.randrange(8 * place.width), now + 512, now + 4096),
            *(
                length,
                length // 512,
                -(-length // 512) * 512,
                choice.randrange(length),
                choice.randrange(length) // 512,
            ),
            *(choice.randrange(length) // 4096 * 4096, other.get(files), choice.randrange(1 << 8 * place.width)),
            *(choice.choice(EDGES), choice.choice(EDGES), choice.randrange(64), 1 << choice.randrange(8 * place.width)),
        ]
    )


def _field(name: str, files: Files, known: Places, choice: random.Random) -> str:
    if not known.fields:
        return _text(name, files, known, choice)
    place = choice.choice(known.fields)
    number = _edge(files, place, known, choice)
    place.put(files, number)
    if name == "vhd" and choice.random() < 0.7:  # the same in the other footer
        for other in known.fields:
            if (other.at - place.at) % 512 == 0 and other.width == place.width and other.at // 512 != 1:
                other.put(files, number)
    return f"{place.file} {place.at}: {place.width} bytes {number % (1 << 8 * place.width):#x}"


def _entry(name: str, files: Files, known: Places, choice: random.Random) -> str:
    table = choice.choice(known.tables) if known.tables else []
    if not table:
        return _field(name, files, known, choice)
    used = [place for place in table if place.get(files)] or table
    place = choice.choice(used if choice.random() < 0.8 else table)
    number = _edge(files, place, known, choice)
    if choice.random() < 0.4:
        number = (
            choice.choice(used).get(files) if choice.random() < 0.5 else place.get(files) ^ 1 << choice.randrange(8)
        )
    place.put(files, number)
    return f"entry at {place.file} {place.at}: {number % (1 << 8 * place.width):#x}"


def _swap(name: str, files: Files, known: Places, choice: random.Random) -> str:
    table = choice.choice(known.tables) if known.tables else []
    if len(table) < 2:
        return _entry(name, files, known, choice)
    one, other = choice.sample(table[: choice.choice([8, 64, len(table)])], 2)
    first, second = one.get(files), other.get(files)
    one.put(files, second)
    if choice.random() < 0.7:
        other.put(files, first)
    return f"entries at {one.at} and {other.at} swapped"


def _cut_table(name: str, files: Files, known: Places, choice: random.Random) -> str:
    table = choice.choice(known.tables) if known.tables else []
    if not table:
        return _field(name, files, known, choice)
    start = choice.randrange(len(table))
    stop = choice.choice([len(table), min(len(table), start + choice.randrange(1, 64))])
    number = choice.choice([0, 0, -1, 1])
    for place in table[start:stop]:
        place.put(files, number)
    return f"entries from {table[start].at} on: {number}"


def _cut_file(name: str, files: Files, known: Places, choice: random.Random) -> str:
    del known
    file = choice.choice(list(files)) if choice.random() < 0.3 else IMAGE
    data = files[file]
    if not data:
        return ""
    at = choice.choice([choice.randrange(len(data)), choice.randrange(len(data)) // 512 * 512, len(data) - 1])
    footer = bytes(data[-512:])
    del data[at:]
    if name in {"vhd", "dmg"} and choice.random() < 0.7:  # which are recognised by their ends
        data += footer
    return f"{file} cut at {at}"


def _longer(name: str, files: Files, known: Places, choice: random.Random) -> str:
    del name, known
    length = choice.choice([1, 511, 512, 4096, 100_000])
    files[IMAGE] += choice.choice([bytes(length), choice.randbytes(length)])
    return f"{length} bytes longer"


def _bit(name: str, files: Files, known: Places, choice: random.Random) -> str:
    del name, known
    data = files[choice.choice(list(files))]
    if not data:
        return ""
    at = choice.randrange(min(len(data), choice.choice([512, 4096, len(data)])))
    data[at] ^= 1 << choice.randrange(8)
    return f"a bit of byte {at}"


def _hostile(name: str, files: Files, known: Places, choice: random.Random) -> str:
    del name, known
    file = choice.choice(list(files)) if choice.random() < 0.3 else IMAGE
    if len(files[file]) > 16:
        damage(files[file], choice)
    return f"{file} damaged"


def _text(name: str, files: Files, known: Places, choice: random.Random) -> str:
    """Change a line of a VMDK's descriptor, a table in a DMG's property list, or do one of the damages of qcow2."""
    if name == "qcow2":
        what = choice.choice(list(DAMAGES))
        DAMAGES[what](Anatomy(files[IMAGE]), choice)
        return what
    if name == "dmg":
        return _property_list(files[IMAGE], choice)
    if name == "vmdk":
        return _descriptor(files[IMAGE], choice)
    return _field(name, files, known, choice)


def _property_list(data: bytearray, choice: random.Random) -> str:
    found = unpacked_tables(bytes(data))
    if not found:
        return ""
    start, end, table = choice.choice(found)
    if len(table) < 212:
        return ""
    rows = (len(table) - 204) // 40
    at, width = choice.choice([(4, 4), (8, 8), (16, 8), (24, 8), (200, 4)])
    if choice.random() < 0.8 and rows:
        at, width = choice.choice([(0, 4), (8, 8), (16, 8), (24, 8), (32, 8)])
        at += 204 + 40 * choice.randrange(rows)
    now = int.from_bytes(table[at : at + width], "big")
    number = choice.choice(
        [now + 1, now - 1, now * 2, 0, 1, choice.choice(EDGES), choice.randrange(len(data)), now + 512]
    )
    table[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "big")
    text = base64.b64encode(table)
    data[start:end] = text.ljust(end - start, b"\n")[: end - start]
    return f"a table's {width} bytes at {at}: {number:#x}"


def _descriptor(data: bytearray, choice: random.Random) -> str:
    at = data.find(b"# Disk DescriptorFile")
    if at < 0:
        return ""
    end = data.find(b"\0", at) if data.find(b"\0", at) > 0 else len(data)
    lines = bytes(data[at:end]).split(b"\n")
    index = choice.randrange(len(lines))
    what = choice.choice(["number", "number", "twice", "gone", "word", "space", "swapped", "case"])
    line = lines[index]
    if what == "number":
        numbers = [str(choice.choice([0, 1, 2, 7, 8, 127, 1 << 31, 1 << 62, 1 << 64, choice.randrange(5000)]))]
        lines[index] = re.sub(rb"\d+", numbers[0].encode(), line, count=1)
    elif what == "twice":
        lines.insert(index, line)
    elif what == "gone":
        del lines[index]
    elif what == "word":
        words = [b"RW", b"FLAT", b"SPARSE", b"VMFS", b"VMFSSPARSE", b"SESPARSE", b"custom", b"monolithicFlat", b"image"]
        lines[index] = re.sub(rb"[A-Za-z]+", choice.choice(words), line, count=1)
    elif what == "space":
        lines[index] = choice.choice([b" " + line, line + b" ", line.replace(b" ", b"  "), line.replace(b"=", b" = ")])
    elif what == "swapped":
        other = choice.randrange(len(lines))
        lines[index], lines[other] = lines[other], lines[index]
    else:
        lines[index] = choice.choice([line.lower(), line.upper(), line.replace(b'"', b"")])
    text = b"\n".join(lines)
    if end < len(data):
        room = 20 * 512
        data[at : at + room] = text[:room].ljust(room, b"\0")
    else:
        data[at:end] = text
    return f"descriptor, line {index} {what}"


_MUTATIONS = (_field, _entry, _swap, _cut_table, _cut_file, _longer, _bit, _hostile, _text)
_WEIGHTS = (30, 22, 6, 4, 10, 2, 6, 6, 14)


def make_true(name: str, data: bytearray) -> None:
    """Make the checksums of an image's structures true, where these still stand at their places."""
    fix = _FIXES.get(name)
    if fix is not None:
        fix(data)


def _sum(data: bytearray, start: int, length: int, at: int) -> None:
    if start >= 0 and start + length <= len(data):
        data[start + at : start + at + 4] = bytes(4)
        data[start + at : start + at + 4] = (~sum(data[start : start + length]) & 0xFFFFFFFF).to_bytes(4, "big")


def _vhd_sums(data: bytearray) -> None:
    for at in (0, len(data) - 512, len(data) - 511):
        if at >= 0 and data.startswith(b"conectix", at):
            _sum(data, at, min(512, len(data) - at), 64)
    if data.startswith(b"conectix"):
        at = int.from_bytes(data[16:24], "big")
        if data.startswith(b"cxsparse", at):
            _sum(data, at, 1024, 36)


def _vhdx_sums(data: bytearray) -> None:
    for at, length in ((1 << 16, 4096), (2 << 16, 4096), (3 << 16, 1 << 16), (4 << 16, 1 << 16)):
        if at + length <= len(data):
            data[at + 4 : at + 8] = bytes(4)
            data[at + 4 : at + 8] = crc32c(bytes(data[at : at + length])).to_bytes(4, "little")

    _vhdx_log_sums(data)


def _vhdx_log_sums(data: bytearray) -> None:
    """Of entries of a log at its usual place, which may go on at the start of the ring."""
    start, ring = 1 << 20, 1 << 20
    at = data.find(b"loge", start, start + ring)
    while at >= 0:
        length = int.from_bytes(data[at + 8 : at + 12], "little")
        if 64 <= length <= 1 << 16 and len(data) >= start + ring:
            data[at + 4 : at + 8] = bytes(4)
            inside = at - start
            whole = bytes(data[at : min(at + length, start + ring)])
            whole += bytes(data[start : start + max(0, inside + length - ring)])
            data[at + 4 : at + 8] = crc32c(whole).to_bytes(4, "little")
        at = data.find(b"loge", at + 4, start + ring)


def _few_iterations(data: bytearray) -> None:
    """Nobody derives keys for hours: tapfs has a bound (docs/specs/luks.md, "Bounds"), and QEMU has none."""
    for at in (164, *range(212, 208 + 8 * 48, 48)):
        if len(data) >= at + 4 and int.from_bytes(data[at : at + 4], "big") > _MOST_ITERATIONS:
            data[at : at + 4] = (_MOST_ITERATIONS - data[at + 3]).to_bytes(4, "big")


_FIXES: dict[str, Callable[[bytearray], None]] = {"vhd": _vhd_sums, "vhdx": _vhdx_sums}
