"""The log of a server process as records of systemd's journal, with fields that journalctl can be asked for.

A service of systemd has the journal as its standard error, and JOURNAL_STREAM says so. A server in the background has
none, and asks whether there is a journal. Each record goes to the journal's own socket: MESSAGE and PRIORITY,
TAPFS_IMAGE and TAPFS_DISK of what is served, and of an ImageError its kind, file, offset and operation. The protocol is
systemd's "Native Journal Protocol".
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
    """Log records as records of the journal; where that takes none, by another way: as lines on standard error.

    `served` is fields that every record has: they may change. `connection` is one that was made before a sandbox.
    """

    def __init__(
        self,
        served: dict[str, str],
        *,
        connection: socket.socket | None = None,
        otherwise: logging.Handler | None = None,
    ) -> None:
        super().__init__()
        self._served = served
        self._connection = connection
        self._otherwise = otherwise

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
            _send(b"".join(_field(name, value) for name, value in fields.items()), self._connection)
        except OSError:
            if self._otherwise is not None:
                self._otherwise.emit(record)
                return
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


def connected() -> socket.socket | None:
    """A connection to the journal, None where there is none."""
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        journal.connect(JOURNAL_SOCKET)
    except OSError:
        journal.close()
        return None
    return journal


def _send(data: bytes, connection: socket.socket | None) -> None:
    journal = connection or connected()
    if journal is None:
        raise OSError(errno.ENOENT, "there is no journal", JOURNAL_SOCKET)
    try:
        journal.send(data)
    except OSError as error:
        if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
            raise
        _send_in_memory(journal, data)
    finally:
        if connection is None:
            journal.close()


def _send_in_memory(journal: socket.socket, data: bytes) -> None:
    """A record that is too long for a datagram, in a sealed file in memory."""
    memory = os.memfd_create("journal-entry", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.write(memory, data)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        socket.send_fds(journal, [b""], [memory])
    finally:
        os.close(memory)
