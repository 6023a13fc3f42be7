"""The log of a server process as records of systemd's journal, with fields that journalctl can be asked for.

A service of systemd has the journal as its standard error, and JOURNAL_STREAM says so. Then each record goes to the
journal's own socket: MESSAGE and PRIORITY, TAPFS_IMAGE and TAPFS_DISK of what is served, and of an ImageError its kind,
file, offset and operation. The protocol is systemd's "Native Journal Protocol".
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys

from tapfs.errors import ImageError

#: The socket at which journald takes records.
JOURNAL_SOCKET = "/run/systemd/journal/socket"

#: syslog(3)'s priorities.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def stderr_is_the_journal() -> bool:
    """Whether systemd has connected standard error of this process to the journal."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


class JournalHandler(logging.Handler):
    """Log records as records of the journal; where that takes none, as lines on standard error.

    `served` is fields that every record has: they may change.
    """

    def __init__(self, served: dict[str, str]) -> None:
        super().__init__()
        self._served = served

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        message = self.format(record)
        fields = {
            "MESSAGE": message,
            "PRIORITY": str(next((p for level, p in _PRIORITIES if record.levelno >= level), _DEBUG)),
            "SYSLOG_IDENTIFIER": "tapfs",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName,
            **self._served,
            **_of_error(record),
        }
        try:
            _send(b"".join(_field(name, value) for name, value in fields.items()))
        except OSError:
            sys.stderr.write(f"{message}\n")
            sys.stderr.flush()


def _of_error(record: logging.LogRecord) -> dict[str, str]:
    """Fields of the ImageError that a record tells of."""
    told = record.args if isinstance(record.args, tuple) else ()
    error = next((each for each in told if isinstance(each, ImageError)), None)
    if error is None:
        return {}
    found = {
        "TAPFS_ERROR": error.kind.value,
        "TAPFS_FILE": error.path,
        "TAPFS_OFFSET": error.offset,
        "TAPFS_OPERATION": error.op,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _field(name: str, value: str) -> bytes:
    """A field with its length before it, so that any value is one."""
    content = value.encode(errors="surrogateescape")
    return name.encode() + b"\n" + len(content).to_bytes(8, "little") + content + b"\n"


def _send(data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        try:
            journal.sendto(data, JOURNAL_SOCKET)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            _send_in_memory(journal, data)


def _send_in_memory(journal: socket.socket, data: bytes) -> None:
    """A record that is too long for a datagram, in a sealed file in memory."""
    memory = os.memfd_create("journal-entry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.write(memory, data)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        journal.connect(JOURNAL_SOCKET)
        socket.send_fds(journal, [b""], [memory])
    finally:
        os.close(memory)
