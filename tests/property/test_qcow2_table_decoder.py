"""The engine's decoder of qcow2's tables against `Driver.map`: for any words the same extents, or `map` is asked."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs import ImageError
from tapfs.disk.chain_map import MappedExtent, map_chain, mapped_extents, merge_mapped
from tapfs.kernel.chain_map import map_blocks
from tests.property.test_table_decoder import AskedError, ask
from tests.qcow2_images import COMPRESSED, COPIED, ZERO, Plain

_CLUSTERS = 8


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


@given(made=images())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_means_to_the_engine_what_it_means_to_the_driver(tmp_path: Path, made: tuple[Plain, int]) -> None:
    image, unit = made
    path = tmp_path / "a.qcow2"
    path.write_bytes(image.build())
    with tapfs.open(path, format="qcow2") as disk:
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


def test_a_good_table_costs_no_question(tmp_path: Path) -> None:
    """The other half of the property: what is right is not left to the driver."""
    entries = {number: (0, 5 * 512 | COPIED, ZERO, 6 * 512)[number % 4] for number in range(64)}
    (tmp_path / "a").write_bytes(Plain(64 * 512, 9, entries=entries).build())
    with tapfs.open(tmp_path / "a") as disk:
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        assert sum(len(block) for block in blocks) == 64
        assert disk.statistics().cache_fills == 1
