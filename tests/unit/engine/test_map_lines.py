"""Runs as lines of text: every number, the words of each kind of run, and pieces of text that end where lines do."""

from __future__ import annotations

import json
import random

from tapfs.kernel.chain_map import MappedRun, runs_of
from tapfs.kernel.map_lines import MapLines, Words

NUMBERS = [0, 1, 9, 10, 4096, (1 << 32) - 1, 1 << 52, (1 << 63) - 1, (1 << 64) - 1]


def runs(count: int) -> list[tuple[int, int, int, int, int, int, int]]:
    chance = random.Random(count)
    return [
        (
            chance.choice(NUMBERS),
            chance.choice(NUMBERS),
            chance.choice(NUMBERS),
            chance.choice([0, 1, 300]),
            chance.randrange(2),
            chance.randrange(4),
            chance.randrange(2),
        )
        for _ in range(count)
    ]


def test_objects() -> None:
    rows = runs(5000)
    asked: list[MappedRun] = []

    def words(run: MappedRun) -> Words:
        asked.append(run)
        return Words(f'"kind": [{run.layer}, {run.file}, {run.kind}]')

    pieces = list(MapLines(words, json=True).of(runs_of(rows)))
    assert len(pieces) > 3
    assert all(piece.startswith(",\n{") for piece in pieces)
    assert json.loads(f"[{''.join(pieces)[1:]}]") == [
        {"start": offset, "length": length, "kind": [layer, file, kind], **({"offset": host} if placed else {})}
        for offset, length, host, layer, file, kind, placed in rows
    ]
    assert len(asked) == len({run[3:] for run in asked}) == len({row[3:] for row in rows})


def test_rows() -> None:
    rows = runs(5000)

    def words(run: MappedRun) -> Words | None:
        return None if run.kind == 1 else Words(f"/a b/{run.file}\udcff", "elsewhere")

    text = "".join(MapLines(words, json=False).of(runs_of(rows)))
    assert text.splitlines() == [
        "{:<15} {:<15} {:<15} {}".format(
            f"{offset:#x}", f"{length:#x}", f"{host:#x}" if placed else "elsewhere", f"/a b/{file}\udcff"
        )
        for offset, length, host, _, file, kind, placed in rows
        if kind != 1
    ]


def test_nothing() -> None:
    assert list(MapLines(lambda _: Words(""), json=True).of(runs_of([]))) == []
    assert list(MapLines(lambda _: None, json=True).of(runs_of(runs(10)))) == []
