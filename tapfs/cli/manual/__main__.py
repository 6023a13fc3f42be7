"""``python -m tapfs.cli.manual DIR``: write the manual pages and the completions below DIR, as below /usr/share."""

from __future__ import annotations

import argparse
import os
import time
from importlib.metadata import version
from pathlib import Path

from tapfs.cli.manual.completions import completion_files
from tapfs.cli.manual.pages import manual_pages


def main(argv: list[str] | None = None) -> int:
    """Write them."""
    parser = argparse.ArgumentParser(prog="python -m tapfs.cli.manual", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    write_all(parser.parse_args(argv).folder, version=version("tapfs"))
    return 0


def write_all(folder: Path, *, version: str) -> list[Path]:
    """Write every file below `folder`; returns their names relative to it.

    The date of the pages is that of $SOURCE_DATE_EPOCH, where it is set: the same source gives the same files.
    """
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    pages = manual_pages(version=version, date=date)
    files = {Path("man", f"man{name[-1]}", name): text for name, text in pages.items()}
    files |= {Path(name): text for name, text in completion_files().items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(files)


if __name__ == "__main__":
    raise SystemExit(main())
