"""The guides as a package installs them, in share/doc/tapfs: README.md, docs/, examples/ and the guide for drivers.

`python scripts/installed_guides.py DIR` writes them below DIR. A link to what only the
repository has becomes its words.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\[([^\]\n]+)\]\(([^)\s]+)\)")


def guides() -> dict[Path, Path]:
    """Each installed name, and the file of the source that it is made of."""
    found = {Path(name): ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")}
    found[Path("formats/README.md")] = ROOT / "tapfs/formats/README.md"  # the sdist has no other
    for folder in ("docs", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".md", ".json", ".py"):
                found[path.relative_to(ROOT)] = path
    return found


def write_guides(folder: Path) -> list[Path]:
    """Write them below `folder`; returns their names relative to it."""
    installed = guides()
    for name, source in installed.items():
        text = source.read_text(encoding="utf-8")
        if name.suffix == ".md":
            text = _LINK.sub(lambda link, name=name: _kept(link, name, installed), text)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(installed)


def _kept(link: re.Match[str], name: Path, installed: dict[Path, Path]) -> str:
    words, target = link[1], link[2].partition("#")[0]
    if not target or "://" in target:
        return link[0]
    return link[0] if Path(os.path.normpath(name.parent / target)) in installed else words


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_guides(Path(sys.argv[1]))
