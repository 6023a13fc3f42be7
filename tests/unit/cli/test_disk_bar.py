"""The bar of a disk above the map: only on a terminal, as wide as that, with signs that its encoding has."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

from tapfs.cli.disk_bar import ASCII, UNICODE, lines
from tapfs.report.picture import COLUMNS, EMPTY, LAYERS, ZEROS
from tests.unit.report.reported_images import overlay_with_faults


def piece(**counts: int) -> list[int]:
    """A piece with so many bytes in the columns of these names."""
    columns = {"top": 0, "base": 1, "packed": LAYERS, "zeros": ZEROS, "empty": EMPTY}
    bytes_ = [0] * COLUMNS
    for name, count in counts.items():
        bytes_[columns[name]] = count
    return bytes_


PIECES = [piece(top=100), piece(base=30, empty=70), piece(packed=100), piece(zeros=100), piece(empty=100)]


def test_the_signs() -> None:
    drawn = list(lines(PIECES, 0, 500, ["top", "base"], UNICODE, colour=False, columns=80))
    assert drawn[1:3] == ["▕█▃▒░·▏", " 010  "]
    legend = (
        "█0 data of top 100 B  ▒0 compressed of top 100 B  █1 data of base 30 B  ░ zeros 100 B  · never written 170 B"
    )
    assert "".join(drawn[3:-1]).split() == legend.split()
    assert max(map(len, drawn)) <= 80
    assert drawn[-1] == ""
    assert list(lines(PIECES, 0, 500, ["one"], ASCII, colour=False, columns=80))[1] == "[#-%0 ]"


def test_colours_tell_the_layers() -> None:
    drawn = list(lines(PIECES, 0, 500, ["top", "base"], UNICODE, colour=True, columns=80))
    assert drawn[1].startswith("▕\x1b[34m█\x1b[0m\x1b[33m▃\x1b[0m\x1b[34m▒")
    assert "\x1b[33m█\x1b[0m data of base 30 B" in "\n".join(drawn)


def on_terminal(command: list[str], folder: Path, columns: int, **environment: str) -> str:
    """What a command writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LC_ALL", "TERM")}
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, env=kept | environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            more = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        text += more
    os.close(ours)
    assert process.wait() == 0
    return text.decode().replace("\r\n", "\n")


def test_on_a_terminal_the_bar_is_above_the_table(tmp_path: Path, tapfs_command: list[str]) -> None:
    overlay_with_faults(tmp_path / "overlay.qcow2", tmp_path / "base.raw")
    words = [*tapfs_command, "map", "overlay.qcow2"]
    shown = on_terminal(words, tmp_path, 60, TERM="xterm", PYTHONIOENCODING="utf-8")
    bar, table = shown.split("\n\n")
    assert "\x1b[34m" in bar
    plain = re.sub(r"\x1b\[\d+m", "", bar).splitlines()
    assert max(map(len, plain)) == 60
    assert re.fullmatch("▕[▁▂▃▄▅▆▇█░]{57,58}▏", plain[1])
    assert "▂" not in plain[1][:2]
    assert "data of base.raw 4 MiB" in "\n".join(plain)
    piped = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert table == piped
    shown = on_terminal(words, tmp_path, 60, TERM="xterm", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert shown.isascii()
    assert "\x1b" not in shown
    assert shown.splitlines()[1].startswith("[##")
