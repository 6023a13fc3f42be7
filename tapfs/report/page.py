"""A report as one HTML page that needs nothing else: its style and script are inside, and nothing is fetched.

Whatever an image says is hostile: names, labels and options stand in the page as text only (`tapfs.report.markup`). The
policy in the head allows the page's own script and style by their hashes, and nothing else.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from tapfs.report.map_section import map_section
from tapfs.report.markup import Markup, element, joined, number, table
from tapfs.report.picture import DAMAGED, UNKNOWN, ZEROS
from tapfs.report.sections import chain, check, contents, facts, figures, fragments
from tapfs.report.words import human, percent, plural, verdict

if TYPE_CHECKING:
    from tapfs.report.gathered import Gathered
    from tapfs.report.picture import Picture

#: The beginning of a page; `tapfs.report.page_file` replaces files that begin so.
BEGINNING = '<!doctype html>\n<html lang="en">\n<meta name="generator" content="tapfs">\n'

#: Base64 of all pictures of a page, and of one picture at least.
_MOST_BYTES = 240 << 10
_LEAST_BYTES = 4 << 10

#: Points of the small bar of an image in the summary, and its height.
_THUMB, _HIGH = 110, 18


def bytes_of_picture(images: int) -> int:
    """The base64 that a picture may take in a page of so many images."""
    return max(_LEAST_BYTES, _MOST_BYTES // max(1, images))


def most_runs(images: int) -> int:
    """The runs that a picture may keep in a page of so many images; if they do not fit, fewer are shown."""
    return bytes_of_picture(images) // 4


def page(title: str, made: str, entries: Sequence[Gathered]) -> str:
    """The page. `made` says when and by what."""
    style, script = _part("page.css"), _part("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    button = element("button", "Dark", type="button", class_="theme", aria_pressed="false", hidden=True)
    title_ = element("div", element("h1", "Disk images" if len(entries) > 1 else "Disk image"), element("p", made))
    return joined(
        [
            Markup(BEGINNING),
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="referrer", content="no-referrer"),
            element("title", title),
            element("style", Markup(style)),
            element("header", element("div", title_, button, class_="wide"), class_="top"),
            element(
                "main",
                _summary(entries) if len(entries) > 1 else "",
                [_article(at, entry, bytes_of_picture(len(entries))) for at, entry in enumerate(entries, start=1)],
                class_="wide",
            ),
            element("span", class_="palette", aria_hidden="true"),
            element("script", Markup(script)),
            Markup("</html>\n"),
        ]
    )


def _part(name: str) -> str:
    return (files("tapfs.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _summary(entries: Sequence[Gathered]) -> Markup:
    disks = sum(entry.infos[0]["virtual_size"] for entry in entries if entry.infos)
    data = sum(entry.picture.data_bytes for entry in entries if entry.picture is not None)
    bad = sum(verdict(entry).tone == "bad" for entry in entries)
    fault = f"; {plural(bad, 'image')} with errors" if bad else ""
    head = [("Image", False), ("Format", False), ("Disk", True), ("Data", True), ("On the host", True)]
    rows = [_summary_row(at, entry) for at, entry in enumerate(entries, start=1)]
    whole = table([*head, ("Map", False), ("Check", False)], rows)
    return element(
        "section",
        element("h2", plural(len(entries), "image"), id="summary"),
        element("p", f"Disks of {human(disks)} in all hold {human(data)} of data{fault}."),
        element("div", whole, class_="scroll", tabindex=0, role="region", aria_label="All images"),
        class_="card",
        aria_labelledby="summary",
    )


def _summary_row(at: int, entry: Gathered) -> Markup:
    found = verdict(entry)
    name = element("th", element("a", entry.path, href=f"#image-{at}"), scope="row")
    verdict_ = element("td", found.words, class_=found.tone)
    if not entry.infos:
        return element("tr", name, [element("td")] * 5, verdict_)
    info, picture = entry.infos[0], entry.picture
    host = sum(each["allocated_size"] for each in entry.infos)
    return element(
        "tr",
        name,
        element("td", info["format"]),
        number(human(info["virtual_size"])),
        number("" if picture is None else human(picture.data_bytes)),
        number(human(host)),
        element("td", "" if picture is None else _thumb(picture)),
        verdict_,
    )


def _thumb(picture: Picture) -> Markup:
    """A small bar of the disk, one path for each column that it shows."""
    paths: dict[int, list[str]] = {}
    for at in range(_THUMB):
        low, high = at * len(picture.bins) // _THUMB, (at + 1) * len(picture.bins) // _THUMB
        bins = picture.bins[low : max(high, low + 1)]
        total = sum(map(sum, bins))
        top = float(_HIGH)
        for column in [*range(ZEROS), DAMAGED, UNKNOWN, ZEROS]:
            tall = _HIGH * sum(each[column] for each in bins) / total if total else 0
            if tall:
                tall = max(tall, 1.0)
                paths.setdefault(column, []).append(f"M{at * 2} {top - tall:.1f}h2v{tall:.1f}h-2z")
                top -= tall
    return element(
        "svg",
        [element("path", class_=f"k{column}", d="".join(path)) for column, path in paths.items()],
        class_="thumb",
        viewBox=f"0 0 {2 * _THUMB} {_HIGH}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{percent(picture.data_bytes, picture.size)} of the disk is data",
    )


def _article(at: int, entry: Gathered, most_bytes: int) -> Markup:
    drawn = entry.picture is not None and entry.picture.size > 0
    found = verdict(entry)
    return element(
        "article",
        element(
            "div",
            element("h2", os.path.basename(entry.path) or entry.path, id=f"name-{at}"),
            element("span", found.words, class_=f"badge {found.tone}"),
            element("p", entry.path, class_="mono"),
            class_="head",
        ),
        "" if entry.error is None else element("p", str(entry.error), class_="bad"),
        _sections(at, entry, most_bytes),
        class_="card",
        id=f"image-{at}",
        aria_labelledby=f"name-{at}",
        data_picture="yes" if drawn else None,
    )


def _sections(at: int, entry: Gathered, most_bytes: int) -> Iterator[Markup]:
    if entry.infos:
        yield figures(entry)
    if entry.picture is not None and entry.picture.size:
        yield map_section(at, entry, entry.picture, most_bytes)
    if entry.infos:
        yield element("div", contents(entry), chain(entry), class_="two")
    if entry.check is not None:
        yield check(entry, entry.check)
    if entry.picture is not None:
        yield fragments(at, entry.picture)
    if entry.facts:
        yield facts(entry)
