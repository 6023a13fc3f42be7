"""The map of one image in a report: the picture that the script draws, and the same facts as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tapfs.errors import printable
from tapfs.report.markup import Markup, data_script, element, number, table
from tapfs.report.packing import packed_picture
from tapfs.report.picture import DAMAGED, EMPTY, LAYERS, UNKNOWN, ZEROS, depth_of
from tapfs.report.words import human, percent

if TYPE_CHECKING:
    from tapfs.report.gathered import Gathered
    from tapfs.report.picture import Picture

#: Rows of the map as a table.
_ROWS = 24

#: The buttons: what the script does, what stands on them, and what is said of an arrow.
_BUTTONS = (
    ("in", "Zoom in", None),
    ("out", "Zoom out", None),
    ("left", "←", "Move left"),
    ("right", "→", "Move right"),
    ("all", "Whole disk", None),
)

_KEYS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("+", "-"), "zoom, "),
    (("←", "→", "Page Up", "Page Down", "Home", "End"), "move, "),
    (("0",), "whole disk, "),
    (("N", "P"), "next and previous finding; or drag, and turn the wheel with Ctrl or where the map has the focus."),
)


def map_section(at: int, entry: Gathered, picture: Picture, most_bytes: int) -> Markup:
    """The map of the image number `at` of a page, in at most so many bytes of base64 besides the plot."""
    names = column_names(entry)
    name = os.path.basename(entry.path)
    viewer = element(
        "div",
        element("canvas", class_="bands", aria_hidden="true"),
        class_="viewer",
        tabindex=0,
        role="application",
        aria_label=f"Map of {name}, {human(picture.size)}",
        aria_describedby=f"keys-{at}",
    )
    buttons = [
        element("button", text, type="button", data_do=action, aria_label=said) for action, text, said in _BUTTONS
    ]
    return element(
        "section",
        element("h3", "Map of the disk"),
        element(
            "div", buttons, element("span", class_="range"), class_="tools", role="group", aria_label=f"Move {name}"
        ),
        viewer,
        element("canvas", class_="overview", aria_hidden="true"),
        element("p", class_="readout", role="status"),
        element(
            "p",
            [[[element("kbd", key), " "] for key in keys] + [meaning] for keys, meaning in _KEYS],
            class_="hint",
            id=f"keys-{at}",
        ),
        _legend(picture, names),
        element("details", element("summary", "What is shown, as a table"), _pieces(picture, names)),
        data_script(_data(entry, picture, names, most_bytes)),
    )


def column_names(entry: Gathered) -> list[str]:
    """The columns of a picture in words."""
    chain = entry.infos[0]["chain"] if entry.infos else []
    names: list[str] = []
    for column in range(ZEROS):
        depth = depth_of(column) or 0
        of = ""
        if len(chain) > 1 and depth < len(chain):
            of = f" of {printable(os.path.basename(chain[depth]['path']))}"
            if depth == LAYERS - 1 and len(chain) > LAYERS:
                of = f" of images {LAYERS} to {len(chain)} of the chain"
        names.append(f"compressed data{of}" if column >= LAYERS else f"data{of}")
    return [*names, "zeros without data", "never written", "unknown, for a parent that is not open has it", "damaged"]


def is_plotted(picture: Picture) -> bool:
    """Whether there is data of the disk as it is in the image file."""
    return any(picture.cells)


def _data(entry: Gathered, picture: Picture, names: Sequence[str], most_bytes: int) -> dict[str, object]:
    packed = packed_picture(picture, most_bytes)
    placed = list(zip(entry.located, picture.places, strict=True))
    return {
        "size": picture.size,
        "width": packed.width,
        "shift": packed.shift,
        "runs": packed.runs,
        "bins": packed.bins,
        "names": names,
        "bands": list(_bands(entry)),
        "marks": [
            (finding.severity.value, place, printable(finding.message))
            for finding, place in placed
            if place is not None
        ],
        "hostMarks": [(finding.severity.value, finding.host_offset) for finding, _ in placed],
        "grid": {**picture.plot._asdict(), "cells": packed.grid},
    }


def _bands(entry: Gathered) -> Iterator[tuple[int, int, str, bool]]:
    """File systems and partitions: offset, length, words, and whether it lies in an extended partition."""
    info = entry.infos[0]
    found = info.get("file_system")
    if found is not None:
        label = f" {printable(found['label'])}" if found["label"] else ""
        yield 0, info["virtual_size"], f"{printable(found['type'])}{label}", False
    partitions = info.get("partitions")
    listed = [] if partitions is None else partitions["table"]
    containers = [(each["start"], each["start"] + each["size"]) for each in listed if each["container"]]
    for each in sorted(listed, key=lambda partition: not partition["container"]):
        system = each["file_system"]
        what = (each["type_name"] or each["type"]) if system is None else system["type"]
        label = (each["name"] if system is None else system["label"] or each["name"]) or ""
        inner = not each["container"] and any(start <= each["start"] < end for start, end in containers)
        yield each["start"], each["size"], printable(f"{each['number']}: {what} {label}".rstrip()), inner


def _legend(picture: Picture, names: Sequence[str]) -> Markup:
    rows: list[Markup] = []
    for column in [*sorted(range(ZEROS), key=lambda each: (each % LAYERS, each)), DAMAGED, UNKNOWN, ZEROS, EMPTY]:
        if not picture.counts[column]:
            continue
        look = {ZEROS: " zeros", UNKNOWN: " unknown", DAMAGED: " unknown"}.get(
            column, " packed" if LAYERS <= column < ZEROS else ""
        )
        rows.append(
            element(
                "tr",
                element("th", element("span", class_=f"swatch k{column}{look}"), names[column], scope="row"),
                number(human(picture.totals[column])),
                number(percent(picture.totals[column], picture.size)),
                number(f"{picture.counts[column]:,}"),
            )
        )
    head = [("Kind", False), ("Bytes", True), ("Share", True), ("Runs", True)]
    return table(head, rows, caption="The bytes of the disk by their kind", class_="legend")


def _pieces(picture: Picture, names: Sequence[str]) -> Markup:
    """The map as a table; the script fills it anew for what is shown."""
    rows: list[Markup] = []
    count = len(picture.bins)
    for at in range(min(_ROWS, count)):
        low, high = at * count // min(_ROWS, count), (at + 1) * count // min(_ROWS, count)
        sums = [sum(column) for column in zip(*picture.bins[low:high], strict=True)]
        total = sum(sums)
        said = ", ".join(f"{percent(each, total)} {names[column]}" for column, each in enumerate(sums) if each)
        place = element("td", f"{low * picture.width:#x}", class_="n mono")
        rows.append(element("tr", place, number(human(total)), element("td", said)))
    return table([("From", True), ("Length", True), ("What is there", False)], rows, class_="pieces")
