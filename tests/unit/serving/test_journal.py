"""The log as records of systemd's journal, where standard error is that."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving import journal
from tapfs.serving.failures import log_failure
from tapfs.serving.log import log, log_to_stderr, log_to_syslog, open_syslog, served, tell_served


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    served.clear()


class Standard:
    """Standard error as a file that JOURNAL_STREAM names, once it is `used`: pytest takes it back before each test."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._file = path.open("w")
        self._monkeypatch = monkeypatch
        found = os.fstat(self._file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        monkeypatch.setattr(journal, "JOURNAL_SOCKET", str(path.with_name("journal")))

    def use(self) -> None:
        self._monkeypatch.setattr("sys.stderr", self._file)

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standard]:
    with closing(Standard(tmp_path / "stderr", monkeypatch)) as standard:
        yield standard


@pytest.fixture
def journald(stderr: Standard) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(30)
        listener.bind(str(stderr.path.with_name("journal")))
        yield listener


def received(journald: socket.socket) -> dict[str, str]:
    """The fields of the next record, read as systemd's description of its protocol says."""
    data, descriptors, _, _ = socket.recv_fds(journald, 1 << 20, 1)
    for descriptor in descriptors:
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            data = file.read()
    fields: dict[str, str] = {}
    while data:
        name, _, data = data.partition(b"\n")
        length = int.from_bytes(data[:8], "little")
        fields[name.decode()] = data[8 : 8 + length].decode()
        assert data[8 + length : 9 + length] == b"\n"
        data = data[9 + length :]
    return fields


def test_a_record_has_fields(journald: socket.socket, stderr: Standard) -> None:
    stderr.use()
    log_to_stderr()
    tell_served(image="/disk.qcow2", disk="nbd://host/disk")
    log.info("the last client\nhas gone")
    found = received(journald)
    assert found["MESSAGE"] == "the last client\\nhas gone"
    assert (found["PRIORITY"], found["SYSLOG_IDENTIFIER"]) == ("6", "tapfs")
    assert (found["TAPFS_IMAGE"], found["TAPFS_DISK"]) == ("/disk.qcow2", "nbd://host/disk")
    assert "TAPFS_ERROR" not in found
    log_failure(ImageError(ErrorKind.NO_SPACE, "is full", path="/other", offset=512, op="write"), "flushing")
    found = received(journald)
    assert (found["PRIORITY"], found["TAPFS_ERROR"], found["TAPFS_FILE"]) == ("3", "no_space", "/other")
    assert (found["TAPFS_OFFSET"], found["TAPFS_OPERATION"]) == ("512", "write")
    assert "is full" in found["MESSAGE"]
    assert stderr.path.read_text() == ""


def test_a_service_in_its_sandbox_uses_the_connection_from_before(
    journald: socket.socket, stderr: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals: list[socket.socket] = []
    monkeypatch.setattr("tapfs.serving.log._journals", journals)
    stderr.use()
    open_syslog()
    monkeypatch.setattr(journal, "JOURNAL_SOCKET", str(stderr.path.with_name("nothing")))
    log_to_stderr()
    log.warning("here")
    assert received(journald)["PRIORITY"] == "4"
    assert stderr.path.read_text() == ""
    journals[0].close()


def test_a_record_that_no_datagram_holds_comes_in_memory(journald: socket.socket, stderr: Standard) -> None:
    stderr.use()
    log_to_stderr()
    log.warning("%s", "w" * (1 << 20))
    assert len(received(journald)["MESSAGE"]) == 1 << 20


def test_without_a_journal_it_is_a_line(stderr: Standard, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr.use()
    log_to_stderr()
    log.warning("nobody listens")
    assert stderr.path.read_text() == "nobody listens\n"
    # Of another stream than this one: the service's standard error is a file of the user's.
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    log_to_stderr("xvda")
    log.warning("here")
    assert stderr.path.read_text() == "nobody listens\ntapfs: xvda: here\n"


def test_what_keeps_a_record_from_the_journal_is_no_error_of_the_service(
    stderr: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(journal, "_send", fail)
    stderr.use()
    log_to_stderr()
    log.error("still told")
    assert stderr.path.read_text() == "still told\n"


def test_a_server_in_the_background_has_records_too(
    journald: socket.socket, stderr: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals: list[socket.socket] = []
    monkeypatch.setattr("tapfs.serving.log._journals", journals)
    told: list[str] = []
    monkeypatch.setattr("syslog.syslog", lambda _priority, line: told.append(line))
    open_syslog()  # a process in its sandbox makes no connection any more
    monkeypatch.setattr(journal, "JOURNAL_SOCKET", str(stderr.path.with_name("nothing")))
    log_to_syslog()
    tell_served(image="/disk.qcow2", disk="/mnt/disk")
    log.warning("going on")
    found = received(journald)
    assert (found["MESSAGE"], found["TAPFS_DISK"]) == ("going on", "/mnt/disk")
    journald.close()
    log.warning("nobody listens")
    assert told == ["nobody listens"]
    journals[0].close()


def test_without_a_journal_a_server_in_the_background_logs_to_syslog(
    stderr: Standard, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals: list[socket.socket] = []
    monkeypatch.setattr("tapfs.serving.log._journals", journals)
    told: list[str] = []
    monkeypatch.setattr("syslog.syslog", lambda _priority, line: told.append(line))
    open_syslog()
    log_to_syslog()
    log.warning("two\nlines")
    assert told == ["two\\nlines"]
