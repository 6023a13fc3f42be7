"""Random chains of random maps against bytes in memory."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tapfs.driver import Cipher
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import Status
from tests.unit.engine.engine_disks import AES, Disk, pattern, place

GRANULE = 512
PER_UNIT = 4
UNIT = PER_UNIT * GRANULE

#: What each granule of a layer is.
LAYER = st.tuples(
    st.lists(
        st.sampled_from([*(kind for kind in Kind if kind is not Kind.BROKEN), Kind.DATA]), min_size=1, max_size=14
    ),
    st.integers(0, GRANULE - 1),
    st.randoms(use_true_random=False),
)


class Modelled:
    """A layer on disk and what it shows: a byte string, and which granules are its own."""

    def __init__(self, folder: Path, number: int, spec: tuple[list[Kind], int, object], cipher: Cipher | None) -> None:
        kinds, cut, choose = spec
        self.size = len(kinds) * GRANULE - cut
        self.plain = [pattern(GRANULE, number * 31 + index) for index in range(len(kinds))]
        self.extents: list[Extent] = []
        self.kinds = kinds
        self.file = folder / f"layer{number}"
        order = list(range(len(kinds)))
        choose.shuffle(order)  # type: ignore[attr-defined]
        image = bytearray(b"\xee" * 100)
        places: dict[int, tuple[int, int]] = {}
        for index in order:
            if kinds[index] is Kind.DATA:
                places[index] = (len(image), 0)
                image += self.plain[index]
            elif kinds[index] is Kind.COMPRESSED:
                packer = zlib.compressobj(9, zlib.DEFLATED, -12)
                payload = packer.compress(self.plain[index]) + packer.flush()
                places[index] = (len(image), len(payload))
                image += payload
        self.file.write_bytes(image)
        #: Where the next reservation goes. Not the size of the file: zeros at a fresh place are not written.
        self.end = (1 << 20) + 37
        self.cipher = cipher
        for index, kind in enumerate(kinds):
            at, length = places.get(index, (0, 0))
            self.extents.append(
                Extent(index * GRANULE, GRANULE, kind, host_offset=at, host_length=length, in_place=kind is Kind.DATA)
            )

    def unit(self, offset: int) -> list[Extent]:
        start = offset - offset % UNIT
        return [extent for extent in self.extents if start <= extent.offset < start + UNIT]


def shown(layers: list[Modelled]) -> bytearray:
    """What the chain shows."""
    below = bytearray()
    for layer in reversed(layers):
        view = below[: layer.size].ljust(layer.size, b"\0")
        for index, kind in enumerate(layer.kinds):
            start, end = index * GRANULE, min((index + 1) * GRANULE, layer.size)
            if kind is Kind.ZERO:
                view[start:end] = bytes(end - start)
            elif kind is not Kind.UNALLOCATED:
                view[start:end] = layer.plain[index][: end - start]
        below = view
    return below


def read(disk: Disk, layers: list[Modelled], offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xdd") * length
    while (outcome := disk.read_into(buffer, offset)).status is Status.MISS:
        disk.install(outcome.layer, layers[outcome.layer].unit(outcome.offset))
    assert outcome.done == length
    return bytes(buffer)


@settings(max_examples=150, deadline=None)
@given(
    specs=st.lists(LAYER, min_size=1, max_size=4),
    cipher=st.sampled_from([None, AES]),
    direct=st.booleans(),
    cache=st.sampled_from([0, 1 << 20]),
    data=st.data(),
)
def test_a_disk_is_what_the_model_says(
    specs: list[tuple[list[Kind], int, object]],
    cipher: Cipher | None,
    direct: bool,  # noqa: FBT001
    cache: int,
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as name, Disk(cache) as disk:
        layers = [
            Modelled(Path(name), number, spec, cipher if number == 0 else None) for number, spec in enumerate(specs)
        ]
        top = layers[0]
        for number, layer in enumerate(layers):
            disk.layer(
                layer.file,
                size=layer.size,
                granule=GRANULE,
                unit=UNIT,
                cipher=layer.cipher,
                writable=number == 0,
                direct=direct and number == 0,
            )
        if cipher is AES:
            for index, kind in enumerate(top.kinds):
                if kind is Kind.DATA:
                    disk.write_host(0, top.extents[index].host_offset, top.plain[index], guest_offset=index * GRANULE)
        model = shown(layers)
        for _ in range(data.draw(st.integers(1, 6), label="requests")):
            offset = data.draw(st.integers(0, top.size - 1), label="offset")
            length = data.draw(st.integers(1, top.size - offset), label="length")
            if data.draw(st.booleans(), label="write"):
                new = pattern(length, data.draw(st.integers(40, 250), label="seed"))
                write(disk, layers, new, offset)
                model[offset : offset + length] = new
            assert read(disk, layers, offset, length) == model[offset : offset + length]
        assert read(disk, layers, 0, top.size) == model


def write(disk: Disk, layers: list[Modelled], new: bytes, offset: int) -> None:
    """Write as the owner of the map does: supply maps, reserve at the end of the file, publish."""
    top = layers[0]
    while new:
        outcome = disk.write(new, offset)
        new, offset = new[outcome.done :], offset + outcome.done
        if outcome.status is Status.MISS:
            disk.install(0, top.unit(outcome.offset))
        elif outcome.status is Status.RESERVE:
            assert outcome.offset == offset
            start = offset - offset % GRANULE
            end = -(-(offset + outcome.length) // GRANULE) * GRANULE
            at = top.end
            top.end += end - start
            # Two placements where there is room for two, the second before the first.
            middle = start + (end - start) // GRANULE // 2 * GRANULE
            placements = [place(middle, end - middle, at, fresh=True)]
            if middle > start:
                placements.insert(0, place(start, middle - start, at + (end - middle), fresh=True))
            part = new[: outcome.length]
            done = 0
            while (written := disk.write_reserved(part, offset, placements, done)).status is Status.MISS:
                done = written.done
                disk.install(written.layer, layers[written.layer].unit(written.offset))
            assert written.done == len(placements)
            for placement in placements:
                for guest in range(placement.offset, placement.offset + placement.length, GRANULE):
                    place_in_file = placement.host_offset + guest - placement.offset
                    top.extents[guest // GRANULE] = Extent(
                        guest, GRANULE, Kind.DATA, host_offset=place_in_file, in_place=True
                    )
            disk.forget(0, start, end - start)
