"""Serve the image of a folder by a mount or by NBD, write to it, end the server, and note what was acknowledged.

usage: served_writer.py mount|serve FOLDER FORMAT. The notes are beside the folder: "write", "zero", "end". The exit
status is that of the first command that fails, or 1 where a write does.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import nbd_client as nbd

#: Name, offset, and bytes of each write.
WRITES = (("write", 700_000, b"\x55" * 600_000), ("zero", 5 << 19, bytes(512)))
_DETACH = 2
_TAPFS = [sys.executable, "-m", "tapfs.cli"]


def _mounted(image: Path, format_name: str, temporary: Path, notes: list[str]) -> int:
    directory = temporary / "mount"
    directory.mkdir()
    begun = subprocess.run([*_TAPFS, "mount", "--rw", "-f", format_name, image, directory], check=False).returncode
    if begun != 0:
        return begun
    status = 0
    try:
        disk = os.open(directory / "disk", os.O_RDWR)
        try:
            for name, offset, data in WRITES:
                done = 0
                while done < len(data):  # a write that fails behind its beginning is a short one
                    done += os.pwrite(disk, data[done:], offset + done)
                os.fsync(disk)
                notes.append(name)
        finally:
            os.close(disk)
    except OSError as error:
        sys.stdout.write(f"the writer: {error}\n")
        status = 1
    ended = subprocess.run([*_TAPFS, "umount", directory], check=False).returncode
    if ended != 0:  # whatever the fault has made of the unmounting, the mount must not be left
        ctypes.CDLL(None).umount2(bytes(directory), _DETACH)  # not by a program, which meets the fault, too
    return ended or status


def _served(image: Path, format_name: str, temporary: Path, notes: list[str]) -> int:
    place = str(temporary / "socket")
    words = ["serve", "--rw", "--exit-when-idle", "--socket", place, "-f", format_name, str(image)]
    with subprocess.Popen([*_TAPFS, *words], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        if not server.stdout.readline():  # it says where it listens, or it has ended
            return server.wait()
        failed = 0
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(place)
                client = nbd.Client(connection)
                client.go()
                for name, offset, data in WRITES:
                    error = client.ask(nbd.WRITE, offset, data=data, flags=nbd.FUA).error
                    failed = failed or error
                    notes += [] if error else [name]
            except (OSError, EOFError) as error:
                sys.stdout.write(f"the client: {error}\n")
                failed = 1
        return server.wait() or int(failed != 0)


def main() -> int:
    how, folder, format_name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tapfs-served-", ignore_cleanup_errors=True) as temporary:
        os.environ["TAPFS_RUNTIME_DIR"] = f"{temporary}/runtime"
        serve = {"mount": _mounted, "serve": _served}[how]
        status = serve(folder / "image", format_name, Path(temporary), notes)
    if status == 0:
        notes.append("end")
    (folder.parent / "noted").write_text(" ".join(notes))
    return status


if __name__ == "__main__":
    sys.exit(main())
