"""A server of a virtual machine's disk is in a sandbox: a driver that is evil on purpose gets nowhere in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evil_driver import ATTEMPTS, EvilDriver
from tests.vhost.test_serving import connected, serving
from tests.vhost_front_end import Ring


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("options", [[], ["--no-sandbox"]], ids=["sandbox", "without"])
def test_an_evil_driver_gets_nowhere(
    tapfs_command: list[str], evil: EvilDriver, tmp_path: Path, options: list[str]
) -> None:
    path = tmp_path / "machine" / "disk.sock"
    path.parent.mkdir()
    variables = evil.environment | {"TAPFS_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = ["env", *(f"{name}={value}" for name, value in variables.items()), *tapfs_command]
    with serving(command, *options, evil.image, "--vhost-user", path) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"{path}\n"
        ring = Ring(connected(path))
        ring.set_up()
        assert ring.read(0, 4096) == evil.image.read_bytes()[:4096]
        ring.front_end.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    # A server is still to be forked when it opens its image.
    opening = ATTEMPTS if options else frozenset({"fork"})
    serving_it = ATTEMPTS if options else frozenset[str]()
    assert evil.done() == {"probe": opening, "open": opening, "map": serving_it}, evil.results()
    assert os.listdir(path.parent) == []
