"""A map counted into bins by the engine is what Python counts: bytes, runs, fragments, the plot and the places."""

from __future__ import annotations

import random

import pytest

from tapfs.kernel.chain_map import runs_of
from tapfs.kernel.map_bins import Counted, MapBins, Plot

Row = tuple[int, int, int, int, int, int, int]

WIDTH, BINS = 1000, 40
SIZE = WIDTH * BINS - 300
PLOT = Plot(16, 8, -(-SIZE // 16), 700)


def counted(seed: int, places: list[int]) -> tuple[list[Row], MapBins]:
    """Runs of all lengths, and what the engine counts of them in two steps."""
    chance = random.Random(seed)
    rows: list[Row] = []
    at = host = 0
    while at < SIZE:
        length = min(SIZE - at, chance.choice([1, 17, 512, 1000, 7000]))
        host = chance.choice([host, chance.randrange(9000)])
        rows.append((at, length, host, chance.randrange(2), 0, chance.randrange(3), chance.randrange(2)))
        at += length
        host += length
    bins = MapBins(
        lambda run: Counted(run.layer * 3 + run.kind, data=run.kind == 0, plotted=run.layer == 0),
        columns=6,
        width=WIDTH,
        count=BINS,
        plot=PLOT,
        places=places,
    )
    half = len(rows) // 2
    bins.add(runs_of(rows[:half]))
    bins.add(runs_of(rows[half:]))
    bins.finish()
    return rows, bins


@pytest.mark.parametrize("seed", range(20))
def test_it_counts_what_python_counts(seed: int) -> None:
    places = sorted(random.Random(seed).sample(range(9000), 9))
    rows, bins = counted(seed, places)
    expected = [[0] * 6 for _ in range(BINS)]
    cells = [0] * (PLOT.across * PLOT.down)
    found: list[int | None] = [None] * len(places)
    fragments = [0] * 64
    last, end, joined = (-1, -1), 0, 0
    for offset, length, host, layer, _, kind, placed in rows:
        for at in range(offset, offset + length):
            expected[at // WIDTH][layer * 3 + kind] += 1
        if kind or not placed:
            continue
        if joined and (last != (layer, kind) or end != host):
            fragments[joined.bit_length() - 1] += 1
            joined = 0
        last, end, joined = (layer, kind), host + length, joined + length
        if layer == 0:
            for byte in range(length):
                if (host + byte) // PLOT.y < PLOT.down:
                    cells[(host + byte) // PLOT.y * PLOT.across + (offset + byte) // PLOT.x] += 1
            found = [
                offset + place - host if host <= place < host + length else before
                for place, before in zip(places, found, strict=True)
            ]
    fragments[joined.bit_length() - 1] += 1 if joined else 0
    assert bins.rows() == expected
    assert bins.runs() == [sum((layer * 3 + kind) == each for _, _, _, layer, _, kind, _ in rows) for each in range(6)]
    assert bins.plot() == cells
    assert bins.fragments() == fragments
    assert bins.places() == found


def test_a_place_far_behind_the_file_ends_at_once() -> None:
    bins = MapBins(
        lambda _: Counted(0, data=True, plotted=True), columns=1, width=1 << 50, count=1, plot=Plot(1, 1, 1 << 50, 1)
    )
    bins.add(runs_of([(0, 1 << 50, 1 << 40, 0, 0, 0, 1)]))
    assert bins.plot() == [0]
    assert bins.rows() == [[1 << 50]]


def test_a_part_of_the_map_is_counted_from_its_start() -> None:
    bins = MapBins(lambda _: Counted(0, data=False, plotted=False), columns=1, width=10, count=2, start=100)
    bins.add(runs_of([(0, 105, 0, 0, 0, 1, 0), (110, 100, 0, 0, 0, 1, 0)]))
    assert bins.rows() == [[5], [10]]
    with pytest.raises(ValueError, match="column"):
        MapBins(lambda _: Counted(1, data=False, plotted=False), columns=1, width=1, count=1).add(
            runs_of([(0, 1, 0, 0, 0, 0, 0)])
        )
