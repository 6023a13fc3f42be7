"""The sections of one image in a report besides its map: figures, contents, chain, check, fragments, facts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tapfs.report.map_section import is_plotted
from tapfs.report.markup import Markup, element, number, table
from tapfs.report.picture import LAYERS
from tapfs.report.words import human, percent, plural

if TYPE_CHECKING:
    from tapfs.driver import CheckReport
    from tapfs.partitions.table import FileSystemInfo, PartitionInfo
    from tapfs.report.gathered import Gathered
    from tapfs.report.picture import Picture

#: Rows of what `tapfs info` says, and partitions: a hostile image has more.
_MOST_ROWS = 200

_TONES = {"corruption": "bad", "leak": "warn", "note": "none"}


def figures(entry: Gathered) -> Markup:
    """The numbers that matter."""
    info, picture = entry.infos[0], entry.picture
    host = sum(each["allocated_size"] for each in entry.infos)
    files = plural(len([file for each in entry.infos for file in each["files"]]), "file")
    tiles = [("Disk", human(info["virtual_size"]), f"{info['format']}, in pieces of {human(info['granule'])}")]
    if picture is not None:
        tiles.append(("Data", human(picture.data_bytes), f"{percent(picture.data_bytes, picture.size)} of the disk"))
    of = "" if len(entry.infos) == 1 else f" of {len(entry.infos)} images"
    tiles.append(("On the host", human(host), f"{files}{of}"))
    if picture is not None and picture.packed_bytes:
        share = percent(host, picture.data_bytes)
        tiles.append(("Compressed", human(picture.packed_bytes), f"data takes {share} of its length"))
    if picture is not None and any(picture.fragments):
        pieces = sum(picture.fragments)
        mean = (picture.data_bytes - picture.packed_bytes) // pieces
        tiles.append(("Fragments", f"{pieces:,}", f"{human(mean)} each on average"))
    return element(
        "dl",
        [
            element("div", element("dt", name), element("dd", value, element("small", more)))
            for name, value, more in tiles
        ],
        class_="figures",
    )


def contents(entry: Gathered) -> Markup:
    """Partitions and file systems."""
    info = entry.infos[0]
    parts: list[Markup] = []
    found, partitions = info.get("file_system"), info.get("partitions")
    if found is not None:
        parts.append(element("p", f"The whole disk is {_file_system(found)}."))
    if partitions is not None and partitions["table"]:
        rows = [_partition(each) for each in partitions["table"][:_MOST_ROWS]]
        caption = f"{partitions['scheme']}, sectors of {partitions['sector_size']} bytes"
        head = [("", True), ("Start", True), ("Size", True), ("Type and file system", False), ("Map", False)]
        parts.append(element("div", table(head, rows, caption=caption), class_="scroll"))
    if partitions is None:
        why = "The disk was not looked at: its password was not given." if info["encrypted"] else "Not looked at."
        parts.append(element("p", why))
    elif not parts:
        parts.append(element("p", "No partition table and no file system that tapfs knows."))
    notes = [] if partitions is None else partitions["notes"]
    parts.append(element("ul", [element("li", note) for note in notes], class_="notes") if notes else Markup(""))
    return element("section", element("h3", "On the disk"), parts)


def _partition(partition: PartitionInfo) -> Markup:
    system = partition["file_system"]
    words = [partition["type_name"] or partition["type"], partition["name"], system and _file_system(system)]
    if partition["bootable"]:
        words.append("bootable")
    show = element(
        "button",
        "Show",
        type="button",
        data_from=partition["start"],
        data_length=partition["size"],
        aria_label=f"Show partition {partition['number']} on the map",
    )
    return element(
        "tr",
        element("th", str(partition["number"]), scope="row"),
        number(human(partition["start"])),
        number(human(partition["size"])),
        element("td", ", ".join(word for word in words if word)),
        element("td", show),
    )


def _file_system(found: FileSystemInfo) -> str:
    return f"{found['type']} “{found['label']}”" if found["label"] else found["type"]


def chain(entry: Gathered) -> Markup:
    """The images that the disk is made of, the top one first."""
    info, picture = entry.infos[0], entry.picture
    rows: list[Markup] = []
    for depth, link in enumerate(info["chain"]):
        column = min(depth, LAYERS - 1)
        size = "" if link["virtual_size"] is None else human(link["virtual_size"])
        gives = ""
        if picture is not None and (depth < LAYERS - 1 or len(info["chain"]) <= LAYERS):
            gives = human(picture.totals[column] + picture.totals[column + LAYERS])
        name = [element("span", class_=f"swatch k{column}"), os.path.basename(link["path"]) or link["path"]]
        state = "" if link["state"] == "open" else link["message"] or link["state"]
        rows.append(
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", link["format"] or "", element("span", f" {state}", class_="bad") if state else ""),
                number(size),
                number(gives),
            )
        )
    head = [("Image", False), ("Format", False), ("Disk", True), ("Gives", True)]
    caption = "The top image decides first; what it lacks comes from the next one"
    return element(
        "section", element("h3", "Chain"), table(head, rows, caption=caption if len(info["chain"]) > 1 else "")
    )


def check(entry: Gathered, report: CheckReport) -> Markup:
    """What a check has found, with buttons to see it on the map."""
    if report.unchecked is not None:
        return element("section", element("h3", "Check"), element("p", f"Nothing was checked: {report.unchecked}."))
    places = {} if entry.picture is None else dict(zip(map(id, entry.located), entry.picture.places, strict=True))
    items: list[Markup] = []
    for finding in report.findings:
        place = places.get(id(finding))
        where = "" if finding.host_offset is None else f" (at byte {finding.host_offset:#x} of the file)"
        show = element(
            "button", "Show", type="button", data_from=place, aria_label=f"Show {finding.severity.value} on the map"
        )
        items.append(
            element(
                "li",
                element("b", finding.severity.value, class_=_TONES[finding.severity.value]),
                element("span", f"{finding.message}{where}"),
                "" if place is None else show,
            )
        )
    hidden = report.corruptions + report.leaks - sum(each.severity.value != "note" for each in report.findings)
    sums = f"{plural(report.corruptions, 'error')}, {plural(report.leaks, 'leak')} of {human(report.leaked_bytes)}."
    if not report.corruptions and not report.leaks:
        sums = "No errors, and no space is lost."
    kept = element("ul", items, class_="findings", tabindex=0, aria_label="Findings")
    return element(
        "section",
        element("h3", "Check"),
        element("p", sums),
        kept if items else "",
        element("p", f"{plural(hidden, 'more finding')}.") if hidden > 0 else "",
    )


def fragments(at: int, picture: Picture) -> Markup:
    """How the image file is read when the disk is read from its start to its end."""
    counts = [(1 << power, count) for power, count in enumerate(picture.fragments) if count]
    if not counts:
        return Markup("")
    most = max(count for _, count in counts)
    rows = [
        element(
            "tr",
            element("th", f"{human(length)} to {human(2 * length)}", scope="row"),
            number(f"{count:,}"),
            element("td", _bar(count, most)),
        )
        for length, count in counts
    ]
    caption = "Pieces that are read on without a jump when the disk is read in order"
    lengths = table([("Length", False), ("Pieces", True), ("", False)], rows, caption=caption)
    plot = [
        element("p", "Disk (to the right) against image file (down): a diagonal lies in order, a cloud is scattered."),
        element("canvas", class_="grid", role="img", aria_label="Plot of disk against file", id=f"plot-{at}"),
    ]
    grid = element("div", plot if is_plotted(picture) else "")
    return element("section", element("h3", "Fragments"), element("div", element("div", lengths), grid, class_="two"))


def _bar(part: int, whole: int) -> Markup:
    wide = max(1, part * 200 // whole)
    rect = element("rect", width=wide, height=12)
    return element("svg", rect, class_="bar", viewBox="0 0 200 12", preserveAspectRatio="none", aria_hidden="true")


def facts(entry: Gathered) -> Markup:
    """All that `tapfs info -v` says."""
    rows = [
        element("tr", element("th", label, scope="row") if label else element("td"), element("td", value))
        for label, value in entry.facts[:_MOST_ROWS]
    ]
    left = len(entry.facts) - _MOST_ROWS
    return element(
        "section",
        element("h3", "Facts"),
        element("table", element("tbody", rows), class_="facts"),
        element("p", f"{plural(left, 'line')} more: tapfs info -v has them.") if left > 0 else "",
    )
