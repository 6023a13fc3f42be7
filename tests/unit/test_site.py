"""The documentation site: every guide is in its menu, every page of the menu is there, and links lead to pages."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import tapfs
from scripts.build_site import MENU, write_source
from tests.conftest import REPOSITORY


def test_every_guide_is_in_the_menu() -> None:
    wanted = [pattern for patterns in MENU.values() for pattern in patterns]
    guides = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), REPOSITORY / "formats/README.md"]
    names = [str(path.relative_to(REPOSITORY)) for path in guides]
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in wanted)] == []


def test_the_source_of_the_site_is_whole(tmp_path: Path) -> None:
    write_source(tmp_path)
    menu = re.findall(r"^([\w/.-]+)$", (tmp_path / "index.md").read_text(), re.MULTILINE)
    pages = {
        str(path.relative_to(tmp_path)).rpartition(".")[0]
        for path in tmp_path.rglob("*.*")
        if path.suffix in {".md", ".rst"}
    }
    assert pages - {"index"} == set(menu)
    assert len(menu) == len(set(menu)) > 40
    api = (tmp_path / "api.rst").read_text()
    for name in tapfs.__all__:
        assert name.startswith("_") or f":: tapfs.{name}\n" in api
    for page in tmp_path.rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).is_file(), f"{page}: {link}"
