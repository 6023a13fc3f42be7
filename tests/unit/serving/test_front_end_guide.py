"""The front end that docs/front-end.md shows as an example does what the page says."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tests.conftest import REPOSITORY
from tests.fuse.conftest import wait_for

_BEFORE = """
from __future__ import annotations
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
import tapfs, trio
from tapfs import Image
from tapfs.serving.asking import unknown_command
from tapfs.serving.failures import ErrorLog
from tapfs.serving.local_socket import listen, receive_line
from tapfs.serving.service import Service
from tapfs.serving.threads import in_thread
"""

_AFTER = """
image = tapfs.open(sys.argv[1], format="qcow", writable=True)
image.write(0, b"never flushed by a client")
LineServer(image, Path(sys.argv[2])).run()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow"
    tapfs.create(path, "qcow", 1 << 20)
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[subprocess.Popen[str]]:
    (example,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/front-end.md").read_text(), re.DOTALL)
        if "class LineServer" in block
    )
    command = [sys.executable, "-c", _BEFORE + example + _AFTER, str(image), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (tmp_path / "control").exists() or process.poll() is not None)
        yield process
        process.kill()


def ask(path: Path, *lines: bytes) -> list[bytes]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        answers: list[bytes] = []
        for line in lines:
            connection.sendall(line + b"\n")
            answers.append(connection.recv(65536))
        return answers


def test_the_example_serves_and_ends_in_order(server: subprocess.Popen[str], image: Path, tmp_path: Path) -> None:
    assert ask(tmp_path / "disk", b"6 7", b"0 5", b"%d 1" % (1 << 20), b"nonsense") == [
        b"flushed",
        b"never",
        b"error 34\n",
        b"error 5\n",
    ]
    status, unknown = (json.loads(answer) for answer in ask(tmp_path / "control", *[b'{"command": "status"}', b"{}"]))
    assert status["ok"] is True
    assert status["bytes_read"] == 12
    assert unknown["kind"] == "unsupported"
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert not (tmp_path / "disk").exists()
    with tapfs.open(image, format="qcow") as opened:
        assert opened.read(0, 25) == b"never flushed by a client"
