"""A storage daemon of QEMU that opens one image after the other and shows each by NBD: no process for each image."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.nbd_client import READ, SIMPLE, Client
from tests.peer.qcow2_damage.sound import PASSWORD

#: Of address space, for the daemon.
_MEMORY = 6 << 30
#: Of a file that it writes, when it replays a log.
_LONGEST_FILE = 1 << 30
#: For an answer; an image may ask for hours of key derivation.
_SECONDS = 20.0
_NODE, _EXPORT = "image", "export"


def _has(key: str, message: Mapping[str, Any]) -> bool:
    return key in message


class QemuError(Exception):
    """QEMU refuses an image, or cannot read a place; the message is its own."""


class EndedError(QemuError):
    """The daemon ended itself over an image, or did not answer in time."""


class Daemon:
    """The daemon of a folder of programs, or the system's; its own folder is where images name other files."""

    def __init__(self, folder: Path, programs: Path | None) -> None:
        self._folder, self.programs = folder, programs
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self._waiting = b""
        self._count = 0
        program = "qemu-storage-daemon" if programs is None else str(programs / "qemu-storage-daemon")
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        #: Of the daemon: the first number of its version.
        self.version = int(said.split("version ")[1].split(".")[0])
        self._program = program

    def open(self, image: Path, driver: str, *, encrypted: bool = False, logged: bool = False) -> int:
        """Open an image for reading and show it; the bytes of its disk. Raises QemuError.

        One that is `logged` is opened for writing: what waits in its log is written into the file.
        """
        self.close_image()
        opened: dict[str, Any] = {
            "driver": driver,
            "node-name": _NODE,
            "read-only": not logged,
            "file": {"driver": "file", "filename": str(image)},
        }
        if encrypted and driver == "luks":
            opened["key-secret"] = "secret"
        elif encrypted:
            opened["encrypt"] = {"format": "luks" if driver == "qcow2" else "aes", "key-secret": "secret"}
        self._ask("blockdev-add", opened)
        export = {"id": _EXPORT, "type": "nbd", "node-name": _NODE, "name": _EXPORT}
        self._ask("block-export-add", export)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_SECONDS)
        connection.connect(str(self._folder / "nbd"))
        self._client = Client(connection)
        self._client.go(_EXPORT, style=SIMPLE)
        return self._client.size

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk. Raises QemuError."""
        assert self._client is not None
        try:
            answer = self._client.ask(READ, offset, length)
        except (EOFError, OSError) as error:
            raise EndedError(self._end(f"{type(error).__name__} while it reads")) from error
        if answer.error:
            raise QemuError(os.strerror(answer.error))
        return answer.data[offset]

    def close_image(self) -> None:
        """Close what is open, without a word of what fails: the next image begins with a new daemon then."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is None:
            return
        try:
            self._ask("block-export-del", {"id": _EXPORT, "mode": "hard"}, awaited="BLOCK_EXPORT_DELETED")
        except EndedError:
            return
        except QemuError:
            pass
        try:
            self._ask("blockdev-del", {"node-name": _NODE})
        except QemuError as error:
            if "Failed to find node" not in str(error):
                self._end("closing")

    def end(self) -> None:
        """End the daemon."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None:
            self._end("")

    # -- inside ---------------------------------------------------------------------------------

    def _begin(self) -> subprocess.Popen[bytes]:
        (self._folder / "nbd").unlink(missing_ok=True)
        self._waiting = b""
        # The daemon must not outlive this process, whatever ends it.
        words = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "prlimit",
            f"--as={_MEMORY}",
            f"--fsize={_LONGEST_FILE}",
            shutil.which(self._program),
        ]
        words += ["--object", f"secret,id=secret,data={PASSWORD.decode()}"]
        words += ["--chardev", "stdio,id=q", "--monitor", "chardev=q"]
        words += ["--nbd-server", f"addr.type=unix,addr.path={self._folder / 'nbd'},max-connections=0"]
        with (self._folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )
        self._process = process
        self._next(partial(_has, "QMP"))
        self._say("qmp_capabilities", {})
        self._next(partial(_has, "return"))
        return process

    def _ask(self, command: str, arguments: Mapping[str, Any], awaited: str | None = None) -> None:
        if self._process is None:
            self._begin()
        self._say(command, arguments)
        count = self._count
        events: list[str] = []

        def is_answer(message: Mapping[str, Any]) -> bool:
            if "event" in message:
                events.append(message["event"])
            return message.get("id") == count

        answer = self._next(is_answer)
        if "error" in answer:
            raise QemuError(str(answer["error"]["desc"]))
        while awaited is not None and awaited not in events:
            events.append(self._next(partial(_has, "event"))["event"])

    def _say(self, command: str, arguments: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._count += 1
        message = {"execute": command, "arguments": dict(arguments), "id": self._count}
        try:
            # Names are bytes in any order, and the protocol has UTF-8 only.
            self._process.stdin.write(json.dumps(message).encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EndedError(self._end("does not listen")) from error

    def _next(self, wanted: Callable[[Mapping[str, Any]], bool]) -> Any:
        """The next message that is wanted. Raises EndedError."""
        assert self._process is not None
        assert self._process.stdout is not None
        end = time.monotonic() + _SECONDS
        descriptor = self._process.stdout.fileno()
        while True:
            line, newline, rest = self._waiting.partition(b"\n")
            if newline:
                self._waiting = rest
                message = json.loads(line.decode("utf-8", "replace"))
                if wanted(message):
                    return message
                continue
            left = end - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise EndedError(self._end("does not answer in time"))
            piece = os.read(descriptor, 65536)
            if not piece:
                raise EndedError(self._end("ended itself"))
            self._waiting += piece

    def _end(self, why: str) -> str:
        """End the process; what it said last, behind `why`."""
        process, self._process = self._process, None
        if process is None:
            return why
        process.kill()
        process.communicate()
        said = (self._folder / "said").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{why}: {said[-1]}" if said else why
