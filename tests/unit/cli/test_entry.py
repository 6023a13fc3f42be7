"""The installed programs leave their process at once, and what had to happen before has happened."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import atexit, sys, threading, time
import tapfs.cli.main
from tapfs.cli import entry

class Kept:
    def __del__(self):
        print("taken apart", file=sys.stderr)

kept = Kept()
atexit.register(print, "registered")

def work():
    time.sleep(0.05)
    print("a thread's work")

def main():
    print("done")
    if {thread}:
        threading.Thread(target=work).start()
    return 3

tapfs.cli.main.main = main
sys.exit(entry.tapfs())
"""


@pytest.mark.parametrize("thread", [False, True])
def test_leaving(thread: bool) -> None:  # noqa: FBT001
    script = _PROGRAM.format(thread=thread)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == sorted(["done", "registered", *(["a thread's work"] if thread else [])])
    assert done.stderr == ("taken apart\n" if thread else "")
