"""A report in Chromium: it is drawn, scripts and the policy of its head do not complain, axe-core finds nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chromium import Chromium
from tests.conftest import Ran
from tests.unit.report.reported_images import HOSTILE, hostile_image, overlay_with_faults

Run = Callable[..., Ran]


def axe_script() -> str:
    found = importlib.util.find_spec("axe_core_python")
    assert found is not None
    assert found.origin is not None
    return (Path(found.origin).parent / "axe.min.js").read_text()


@pytest.fixture
def page(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report about an overlay with faults, a disk with hostile names, and what is no image."""
    monkeypatch.chdir(tmp_path)
    overlay = overlay_with_faults(Path("overlay.qcow2"), Path("base.raw"))
    hostile = hostile_image(Path(f"{HOSTILE.replace('/', '')}.raw"))
    ran = tapfs("report", overlay, hostile, "missing.raw", "--html", "report.html")
    assert ran.code == 17
    return tmp_path / "report.html"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    with Chromium(tmp_path / "profile") as chromium:
        yield chromium


def colours(png: bytes) -> set[bytes]:
    """The colours of a PNG of 8 bits, sampled: the first pixels of rows that are not filtered do."""
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(data)
    return {raw[place : place + 3] for place in range(1, len(raw) - 3, 997)}


def test_the_page_is_drawn_and_accessible(page: Path, browser: Chromium) -> None:
    browser.show(page)
    browser.wait_for("document.querySelector('article').dataset.drawn === 'yes'")
    assert browser.value("document.querySelectorAll('article').length") == 3
    assert browser.value("document.querySelectorAll('*').length") < 1000
    # Nothing that an image says has become an element.
    assert browser.value("document.querySelectorAll('img, b[data-x], iframe').length") == 0
    assert HOSTILE in browser.value("document.body.innerText")
    pictures = []
    browser.value(axe_script())
    for dark in (False, True):
        browser.dark(yes=dark)
        found = json.loads(browser.value("axe.run().then((found) => JSON.stringify(found.violations))"))
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
        pictures.append(browser.screenshot())
        assert len(colours(pictures[-1])) > 20
    assert pictures[0] != pictures[1]
    keys(browser)
    # The button changes the theme of the system.
    browser.value("document.querySelector('.theme').click()")
    assert browser.value("getComputedStyle(document.body).colorScheme") == "light"
    assert browser.complaints == []


def keys(browser: Chromium) -> None:
    """All of the map without a mouse: keys move and zoom it, and what is read aloud follows."""
    said = "document.querySelector('.readout').textContent"
    browser.value("document.querySelector('.viewer').focus()")
    assert browser.value(said).startswith("Shown: 0 B to 64 MiB.")
    browser.press("+")
    assert browser.value(said).startswith("Shown: 16 MiB to 48 MiB.")
    browser.press("Home")
    assert browser.value(said).startswith("Shown: 0 B to 32 MiB.")
    for _ in range(3):
        browser.press("+")
    browser.press("End")
    assert browser.value(said).startswith("Shown: 60 MiB to 64 MiB.")
    browser.press("0")
    browser.press("n")
    assert re.search(r"corruption: .* references", browser.value(said))
    rows = browser.value("document.querySelector('.pieces tbody').textContent")
    assert "data of overlay.qcow2, at 0x" in rows
    drawn = "document.querySelector('.bands').toDataURL()"
    zoomed = browser.value(drawn)
    browser.press("0")
    browser.value("document.querySelector('[data-do=in]').click()")
    assert browser.value(drawn) != zoomed
