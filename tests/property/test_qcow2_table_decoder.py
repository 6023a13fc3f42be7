"""The engine's decoder of qcow2's tables against `Driver.map`: for any words the same extents, or `map` is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ImageError
from tapfs.disk.chain_map import MappedExtent, map_chain, mapped_extents, merge_mapped
from tapfs.extent import Range, clip
from tapfs.formats.qcow2 import owners
from tapfs.kernel._engine import ffi
from tapfs.kernel.chain_map import map_blocks
from tapfs.kernel.writes import Gaps, Segments, write_in_place
from tests.property.test_table_decoder import AskedError, ask
from tests.qcow2_images import COMPRESSED, COPIED, ZERO, Plain

_CLUSTERS = 8


@pytest.fixture(autouse=True)
def any_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in which entries share clusters are opened for writing, too, without the look that refuses them."""
    monkeypatch.setattr(owners, "require_owners", lambda *_: None)


@st.composite
def images(draw: st.DrawFn) -> tuple[Plain, int]:
    """One table of runs, holes, zeros, compressed clusters, and words that cannot be true; the unit that it maps."""
    bits = draw(st.sampled_from([9, 12, 13]))
    cluster = 1 << bits
    count = min(cluster, 4096) // 8
    table: list[int] = []
    while len(table) < count:
        length = draw(st.integers(1, count))
        kind = draw(st.sampled_from(["hole", "run", "run", "zero", "packed", "edge", "any"]))
        if kind == "hole":
            table += [draw(st.sampled_from([0, 0, COPIED]))] * length
        elif kind == "run":
            start = draw(st.integers(5, _CLUSTERS - 1)) * cluster | draw(st.sampled_from([0, COPIED]))
            table += range(start, min(start + length * cluster, (start & COPIED) + _CLUSTERS * cluster), cluster)
        elif kind == "zero":
            table += [ZERO | draw(st.sampled_from([0, 5 * cluster, 7 * cluster | COPIED]))] * length
        elif kind == "packed":
            place = draw(st.integers(cluster, _CLUSTERS * cluster + 600))
            sectors = draw(st.integers(0, (1 << (bits - 8)) - 1))
            table.append(COMPRESSED | sectors << (62 - (bits - 8)) | place)
        elif kind == "edge":
            edges = [1, 2, 512, cluster, 3 * cluster, 4 * cluster, _CLUSTERS * cluster, 6 * cluster + 512, 1 << 57]
            table.append(draw(st.sampled_from(edges)) | draw(st.sampled_from([0, ZERO, COMPRESSED, COPIED])))
        else:
            table.append(draw(st.integers(0, (1 << 64) - 1)))
    version = draw(st.sampled_from([2, 3]))
    return Plain(count * cluster, bits, version, dict(enumerate(table[:count]))), count * cluster


@st.composite
def extended_images(draw: st.DrawFn) -> tuple[Plain, int]:
    """One table of pairs of words: subclusters that are there, zeros or neither; packed ones, and what cannot be."""
    bits = 14
    cluster = 1 << bits
    count = 256
    masks = st.sampled_from([0, 1, 1 << 31, (1 << 32) - 1, 0xFF00, 0x00FF00FF])
    table: list[tuple[int, int]] = []
    while len(table) < count:
        length = draw(st.integers(1, count))
        kind = draw(st.sampled_from(["hole", "run", "run", "mixed", "zero", "packed", "any"]))
        if kind == "hole":
            table += [(draw(st.sampled_from([0, 0, COPIED, ZERO])), 0)] * length
        elif kind == "run":
            start = draw(st.integers(5, _CLUSTERS - 1)) * cluster | draw(st.sampled_from([0, COPIED]))
            places = range(start, min(start + length * cluster, (start & COPIED) + _CLUSTERS * cluster), cluster)
            table += [(place, (1 << 32) - 1) for place in places]
        elif kind == "mixed":
            place = draw(st.integers(0, _CLUSTERS)) * cluster | draw(st.sampled_from([0, COPIED, COPIED, 512]))
            table.append((place, draw(masks) | draw(masks) << 32))
        elif kind == "zero":
            table += [(draw(st.sampled_from([0, 5 * cluster | COPIED])), draw(masks) << 32)] * length
        elif kind == "packed":
            place = draw(st.integers(cluster, _CLUSTERS * cluster + 600))
            table.append((COMPRESSED | draw(st.integers(0, 63)) << 56 | place, draw(st.sampled_from([0, 0, 0, 1]))))
        else:
            table.append((draw(st.integers(0, (1 << 64) - 1)), draw(st.integers(0, (1 << 64) - 1))))
    return Plain(count * cluster, bits, incompatible=16, entries=dict(enumerate(table[:count]))), count * cluster


@given(made=st.one_of(images(), extended_images()), writable=st.booleans(), shared=st.booleans())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_means_to_the_engine_what_it_means_to_the_driver(
    tmp_path: Path, made: tuple[Plain, int], *, writable: bool, shared: bool
) -> None:
    image, unit = made
    path = tmp_path / "a.qcow2"
    content = bytearray(image.build())
    if shared:  # the table may be a snapshot's, too
        content[3 << image.cluster_bits] ^= 0x80
        content[(2 << image.cluster_bits) + 9] = 2
    path.write_bytes(content)
    with tapfs.open(path, format="qcow2", writable=writable) as disk:
        expected: list[MappedExtent] | None
        try:
            expected = list(merge_mapped(map_chain(disk.layers, 0, unit)))
        except ImageError:
            expected = None
        found: list[MappedExtent] | None
        try:
            blocks = list(map_blocks(disk.engine_disk, 0, unit, ask))
            found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, [[str(path)]])))
        except AskedError:
            found = None
        if found is not None:
            assert found == expected
        if writable and expected is not None:
            assert in_place_of(disk, unit) == in_place_of(disk, unit, by_driver=True)
            metadata = 5 << image.cluster_bits
            assert path.read_bytes()[:metadata] == content[:metadata]


def in_place_of(disk: tapfs.Image, unit: int, *, by_driver: bool = False) -> list[Range]:
    """The granules that the engine would not write in place, by its tables or by the driver's map."""
    driver = disk.layers[0].driver
    if by_driver:
        disk.engine_disk.forget(0, 0, unit)
        disk.engine_disk.install(0, list(clip(driver.map(0, unit), 0, unit)))
    disk.engine_disk.seal(sealed=False)  # no bitmap or feature bit is to be changed first
    nothing = ffi.new("uint8_t[]", unit)
    segments = Segments([(0, unit, nothing)])
    gaps = Gaps(segments, driver.geometry.granule)
    outcome = write_in_place(disk.engine_disk, segments, 0, gaps)
    while outcome.incomplete:
        done = outcome.done
        disk.supply_map(outcome)
        outcome = write_in_place(disk.engine_disk, segments, done, gaps)
    return gaps.ranges()


@pytest.mark.parametrize("writable", [False, True], ids=["read", "written"])
@pytest.mark.parametrize("shared", [False, True], ids=["owned", "shared"])
def test_a_good_table_costs_no_question(tmp_path: Path, *, writable: bool, shared: bool) -> None:
    """The other half of the property: what is right is not left to the driver."""
    owned = 0 if shared else COPIED
    entries = {number: (0, 5 * 512 | owned, ZERO, 6 * 512)[number % 4] for number in range(64)}
    content = bytearray(Plain(64 * 512, 9, entries=entries).build())
    if shared:
        content[3 * 512] ^= 0x80
        content[2 * 512 + 2 * 4 + 1] = 2
    (tmp_path / "a").write_bytes(content)
    with tapfs.open(tmp_path / "a", writable=writable) as disk:
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        assert sum(len(block) for block in blocks) == 64
        assert disk.statistics().cache_fills == 1


def test_subclusters_cost_no_question(tmp_path: Path) -> None:
    entries = dict.fromkeys(range(0, 256, 2), (5 << 14 | COPIED, 255 << 8 | 15 << 32))
    (tmp_path / "a").write_bytes(Plain(256 << 14, 14, incompatible=16, entries=entries).build())
    with tapfs.open(tmp_path / "a", writable=True) as disk:
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        assert sum(len(block) for block in blocks) == 4 * 128
        assert disk.statistics().cache_fills == 1
