"""Logging of server processes: to syslog in the background, to stderr in the foreground, or to systemd's journal."""

from __future__ import annotations

import copy
import logging
import os
import socket
import sys
import syslog
import warnings

from tapfs.errors import printable

log = logging.getLogger("tapfs")

#: Fields of the journal that tell what this process serves.
served: dict[str, str] = {}


def tell_served(*, image: str, disk: str) -> None:
    """Have the records of the journal say which image is served, and as what: a mount point, an address."""
    served.update(TAPFS_IMAGE=image, TAPFS_DISK=disk)


class SyslogHandler(logging.Handler):
    """Log records as syslog messages, one per line of text."""

    _PRIORITIES = (
        (logging.ERROR, syslog.LOG_ERR),
        (logging.WARNING, syslog.LOG_WARNING),
        (logging.INFO, syslog.LOG_INFO),
    )

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        priority = next((p for level, p in self._PRIORITIES if record.levelno >= level), syslog.LOG_DEBUG)
        for line in self.format(record).split("\n"):
            syslog.syslog(priority, line)


class PrintableFormatter(logging.Formatter):
    """Records as lines that hold nothing but printable characters; only a traceback has more than one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        safe = copy.copy(record)
        safe.msg, safe.args = printable(record.getMessage()), None
        return "\n".join(map(printable, super().format(safe).split("\n")))


#: Connections to systemd's journal that `open_syslog` has made: one, or none.
_journals: list[socket.socket] = []


def open_syslog() -> None:
    """Connect to syslog, or to systemd's journal, now: a process in its sandbox cannot any more."""
    from tapfs.serving.journal import connected

    syslog.openlog("tapfs", syslog.LOG_PID | syslog.LOG_NDELAY, syslog.LOG_DAEMON)
    if not _journals and (journal := connected()) is not None:
        _journals.append(journal)


def _opened() -> socket.socket | None:
    """The connection that was made before the sandbox, if one was."""
    return _journals[0] if _journals else None


def log_to_syslog() -> None:
    """Send the log to syslog as `tapfs[PID]`; where there is a journal of systemd, as its records with fields."""
    from tapfs.serving.journal import JournalHandler, connected

    syslog.openlog("tapfs", syslog.LOG_PID, syslog.LOG_DAEMON)
    handler: logging.Handler = SyslogHandler()
    if (journal := _opened() or connected()) is not None:
        handler = JournalHandler(served, connection=journal, otherwise=handler)
    _use(handler, "%(message)s")


def log_to_stderr(subject: str | None = None) -> None:
    """Send the log to stderr, in the form of the command line's own messages; each line names the subject.

    Where stderr is systemd's journal the log goes there as records with fields (`tapfs.serving.journal`).
    """
    if "JOURNAL_STREAM" in os.environ:
        from tapfs.serving.journal import JournalHandler, stderr_is_the_journal

        if stderr_is_the_journal():
            served.update({} if subject is None else {"TAPFS_DISK": subject})
            _use(JournalHandler(served, connection=_opened()), "%(message)s")
            return
    named = "" if subject is None else printable(subject).replace("%", "%%") + ": "
    _use(logging.StreamHandler(sys.stderr), f"tapfs: {named}%(message)s")


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    log.warning("%s", message)


def _use(handler: logging.Handler, form: str) -> None:
    handler.setFormatter(PrintableFormatter(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    warnings.showwarning = _log_warning
