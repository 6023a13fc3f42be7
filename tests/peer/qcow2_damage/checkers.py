"""The two checkers of a qcow2 image, each with its verdict: what `tapfs check` and what `qemu-img check` say."""

from __future__ import annotations

import json
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import tapfs
from tapfs.errors import ImageError
from tests.peer.qcow2_damage.sound import PASSWORD

_SECONDS = 60


class Word(StrEnum):
    """A verdict in a word. REFUSED: it could not be checked."""

    CLEAN = "clean"
    CORRUPT = "corrupt"
    LEAKS = "leaks"
    REFUSED = "refused"


class Verdict(NamedTuple):
    """What a checker says: a word, how many corruptions and leaks, and its messages."""

    word: Word
    corruptions: int = 0
    leaks: int = 0
    said: str = ""

    @property
    def counts(self) -> tuple[Word, int, int]:
        """What is compared."""
        return self.word, self.corruptions, self.leaks


def by_tapfs(image: Path) -> Verdict:
    """The verdict of tapfs."""
    try:
        report = tapfs.check(image, format="qcow2")
    except ImageError as error:
        return Verdict(Word.REFUSED, said=str(error))
    said = "\n".join(f"{each.severity}: {each.message}" for each in report.findings)
    word = Word.CORRUPT if report.corruptions else Word.LEAKS if report.leaks else Word.CLEAN
    return Verdict(word, report.corruptions, report.leaks, said)


def by_qemu(image: Path, programs: Path | None, *, encrypted: bool) -> Verdict:
    """The verdict of the qemu-img in a folder, or of the system's."""
    program = "qemu-img" if programs is None else str(programs / "qemu-img")
    words = [program, "check", "--output=json"]
    if encrypted:
        secret = ["--object", f"secret,id=s,data={PASSWORD.decode()}"]
        opened = f"driver=qcow2,file.filename={image},encrypt.format=luks,encrypt.key-secret=s"
        words += [*secret, "--image-opts", opened]
    else:
        words += ["-f", "qcow2", str(image)]
    # QEMU looks for a data file in its own folder.
    ran = subprocess.run(
        words, cwd=image.parent, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS
    )
    said = ran.stderr.replace(str(image), "IMAGE")
    words_of_codes = {0: Word.CLEAN, 2: Word.CORRUPT, 3: Word.LEAKS}
    if ran.returncode not in words_of_codes:
        return Verdict(Word.REFUSED, said=f"exit {ran.returncode}: {said}{ran.stdout}")
    found = json.loads(ran.stdout)
    return Verdict(words_of_codes[ran.returncode], found.get("corruptions", 0), found.get("leaks", 0), said)
