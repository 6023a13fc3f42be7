"""Build the documentation site: the guides, the Python API from its docstrings, the formats from their drivers.

usage: python -m scripts.build_site TARGET

The pages are the Markdown files where they lie, so what is read on the site and in the repository is the same. Sphinx
makes HTML of them that needs no network; a warning of it is an error.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tapfs
from tests.unit.test_format_table import table

REPOSITORY = Path(__file__).parent.parent

#: The pages in the order of the menu, by groups; a `*` stands for all that no group has named before.
MENU = {
    "Start": ["README.md", "formats.md"],
    "Tasks": [
        *("docs/mount.md", "docs/convert.md", "docs/rescue.md", "docs/report.md", "docs/command-line.md"),
        *("docs/survey.md", "docs/monitoring.md", "docs/xen.md", "docs/python.md", "formats/README.md", "docs/*.md"),
    ],
    "Reference": ["api.rst", "docs/json/README.md", "docs/glossary.md", "CHANGELOG.md", "SECURITY.md"],
    "Developers": [
        *("ARCHITECTURE.md", "CONTRIBUTING.md", "HACKING.md", "docs/front-end.md", "kernel/*.md", "kernel/src/*/*.md"),
        *("tests/*.md", "tests/*/*.md", "docs/specs/*.md", "fixtures/*.md"),
    ],
}

#: Pages that a `*` of a group does not take, because a later group names them.
_LATER = {"docs/front-end.md", "docs/glossary.md"}

_CONFIGURATION = """
project = "tapfs"
copyright = "the tapfs authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "tapfs"
html_show_sphinx = False
html_copy_source = False
myst_heading_anchors = 4
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
suppress_warnings = ["misc.highlighting_failure", "ref.python", "toc.not_readable"]
"""

_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]+)?\)")


def main() -> int:
    """Build it into the folder that is named."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        write_source(source)
        shutil.rmtree(target, ignore_errors=True)
        command = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(source / ".doctrees"), folder]
        return subprocess.call([sys.executable, *command, str(target)], cwd=REPOSITORY)


def write_source(source: Path) -> None:
    """Write the pages and the configuration of Sphinx into a folder."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = [name for name in tracked.stdout.splitlines() if (REPOSITORY / name).is_file()]
    (source / "conf.py").write_text(_CONFIGURATION, encoding="utf-8")
    (source / "api.rst").write_text(_api(), encoding="utf-8")
    (source / "formats.md").write_text(
        f"# What can be done with which format\n\n{table()}\n`tapfs formats` shows the same.\n", encoding="utf-8"
    )
    menus: list[str] = []
    placed: set[str] = set()
    for group, wanted in MENU.items():
        pages = [page for pattern in wanted for page in _matching(pattern, names)]
        chosen = [page for page in dict.fromkeys(pages) if page not in placed]
        placed.update(chosen)
        lines = "\n".join(page.rpartition(".")[0] for page in chosen)
        menus.append(f"```{{toctree}}\n:caption: {group}\n:maxdepth: 1\n\n{lines}\n```\n")
    for page in placed - {"api.rst", "formats.md"}:
        _copy(page, source, placed)
    (source / "index.md").write_text("# tapfs\n\n" + "\n".join(menus), encoding="utf-8")


def _matching(pattern: str, names: list[str]) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    depth = pattern.count("/")
    found = [name for name in names if Path(name).match(pattern) and name.count("/") == depth]
    return sorted(name for name in found if name not in _LATER or pattern != "docs/*.md")


def _copy(page: str, source: Path, placed: set[str]) -> None:
    """A page in its place; links to files that are no pages become their names."""

    def linked(found: re.Match[str]) -> str:
        aim = (Path(page).parent / found[1]).as_posix()
        aim = str((REPOSITORY / aim).resolve().relative_to(REPOSITORY))
        return found[0] if aim in placed else f"](https://tapfs.invalid/{aim})"

    text = (REPOSITORY / page).read_text(encoding="utf-8")
    text = _LINK.sub(linked, text)
    text = re.sub(r"\[([^\]]+)\]\(https://tapfs\.invalid/[^)]*\)", r"\1", text)
    path = source / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _api() -> str:
    """The public names of tapfs, each with what its docstring says."""
    parts = ["Python API\n==========\n", ".. currentmodule:: tapfs\n"]
    for name in sorted(tapfs.__all__, key=str.lower):
        if name.startswith("_"):
            continue
        thing = getattr(tapfs, name)
        if inspect.isclass(thing):
            parts.append(f".. autoclass:: tapfs.{name}\n   :members:\n")
        elif callable(thing):
            parts.append(f".. autofunction:: tapfs.{name}\n")
        else:
            parts.append(f".. autodata:: tapfs.{name}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
