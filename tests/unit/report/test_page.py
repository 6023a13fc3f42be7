"""A page of a report: one file that fetches nothing and is bounded, and in which no text of an image is markup."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.report.markup import Markup, data_script, element
from tapfs.report.page import BEGINNING
from tests.conftest import Ran
from tests.scattered_qcow2 import scattered_qcow2, stepped
from tests.unit.report.reported_images import HOSTILE, hostile_image, overlay_with_faults

Run = Callable[..., Ran]


class Elements(HTMLParser):
    """The elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_hostile_name_is_text(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = hostile_image(Path("a<b>&\"'\u202e.raw"))
    ran = tapfs("report", image, "--html", "-", "--no-check")
    assert ran.code == 0
    elements = Elements(ran.out)
    assert not {name for name, _ in elements.found} & {"b", "img", "iframe", "link"}
    assert not [attribute for _, found in elements.found for attribute in found if attribute.startswith("on")]
    assert not [found for _, found in elements.found if {"src", "style"} & found.keys()]
    assert ran.out.count("</script>") == 2
    assert "\u202e" not in ran.out
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', ran.out)
    assert json.loads(data)["bands"][0][2] == f"1: Linux filesystem {HOSTILE}"
    assert HOSTILE in unescape(ran.out)
    assert HOSTILE not in ran.out


def test_the_policy_allows_its_own_style_and_script_alone(tapfs: Run, sample: Path) -> None:
    page = tapfs("map", "-f", "raw", sample, "--html", "-").out
    (policy,) = (found["content"] for name, found in Elements(page).found if found.get("http-equiv"))
    assert policy is not None
    for name in ("style", "script"):
        (text,) = re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
        assert f"{name}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.findall(r"https?://", page)


def test_the_page_of_a_fragmented_disk_is_bounded(tapfs: Run, tmp_path: Path) -> None:
    """A million bytes of map are 240 KiB of page; the number of elements does not depend on it."""
    path = tmp_path / "image.qcow2"
    scattered_qcow2(path, 1 << 40, stepped(1 << 14, 1 << 24))
    page = tapfs("report", path, "--html", "-").out
    assert len(page) < 400 << 10
    assert len(Elements(page).found) < 800


def test_a_page_of_many_images_has_a_summary(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overlay_with_faults(Path("overlay.qcow2"), Path("base.raw"))
    Path("garbage.qcow2").write_bytes(b"QFI\xfb" + os.urandom(100))
    ran = tapfs("report", "overlay.qcow2", "base.raw", "garbage.qcow2", "--html", "r.html")
    assert ran.code != 0
    assert "garbage.qcow2" in ran.err
    assert re.fullmatch(r"r.html: 3 images, [0-9.]+ KiB\n", ran.out)
    page = Path("r.html").read_text()
    assert '<h2 id="summary">3 images</h2>' in page
    assert "2 images with errors" in page
    assert page.count("<article") == 3
    assert "cannot be opened" in page
    assert "Show corruption on the map" in page


def test_an_older_page_is_replaced_and_nothing_else(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    page, image = tmp_path / "page.html", tmp_path / "image.raw"
    image.write_bytes(b"\0" * 512)
    for _ in range(2):
        assert tapfs("map", "-f", "raw", sample, "--html", page).code == 0
    assert page.read_text().startswith(BEGINNING)
    for other in (image, sample):
        ran = tapfs("map", "-f", "raw", image, "--html", other)
        assert ran.code == 18
        assert "exists already and is no page that tapfs has made" in ran.err
    assert image.read_bytes() == b"\0" * 512
    assert tapfs("map", "-f", "raw", image, "--html", tmp_path / "none/page.html").code == 17
    assert tapfs("map", "-f", "raw", image, "--html", tmp_path).code == 11


def test_html_draws_the_whole_disk(tapfs: Run, sample: Path) -> None:
    for words in (["--json"], ["--bitmap", "x"], ["-s", "1K"], ["-l", "1K"]):
        ran = tapfs("map", "-f", "raw", sample, "--html", "-", *words)
        assert ran.code == 64
        assert "--html draws the whole disk" in ran.err


def test_a_missing_parent_and_a_lacking_password_are_told(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overlay_with_faults(Path("overlay.qcow2"), Path("base.raw"))
    Path("base.raw").unlink()
    page = tapfs("report", "overlay.qcow2", "--html", "-").out
    assert "unknown, for a parent that is not open has it" in page
    assert re.search(r'<td>raw<span class="bad"> .*base.raw.*</span></td>', unescape(page))
    tapfs_package.create("locked.qcow2", "qcow2", 1 << 20, password=b"secret")
    page = tapfs("report", "locked.qcow2", "--html", "-").out
    assert "The disk was not looked at: its password was not given." in page


def test_markup_is_what_says_so_and_nothing_else() -> None:
    assert element("p", "<&>", Markup("<br>"), ["a", ["b"]], class_='"x"', data_x=None, hidden=True) == (
        '<p class="&quot;x&quot;" hidden>&lt;&amp;&gt;<br>ab</p>'
    )
    assert data_script({"a": "</script>"}) == '<script type="application/json">{"a":"\\u003c/script\\u003e"}</script>'


def test_in_a_process_of_its_own_a_page_is_written_from_the_sandbox(
    tapfs_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overlay_with_faults(Path("overlay.qcow2"), Path("base.raw"))
    Path("pages").mkdir()
    for words in (
        ["map", "--html", "pages/map.html", "overlay.qcow2"],
        ["map", "--html", "pages/alone.html", "--no-backing", "overlay.qcow2"],
        ["report", "overlay.qcow2", "base.raw", "--html", "pages/report.html"],
    ):
        ran = tapfs_process(*words)
        assert (ran.code, ran.err) == (0, ""), words
    assert len(list(Path("pages").iterdir())) == 3
