"""The starters: processes outside of a sandbox that start those which fetch and which write, for the process inside.

Whoever parses an image is to have no network, and what lies elsewhere is fetched, and written, by processes that have
(`fetcher`, `writer`). A parent's address stands in a header, so that the process for it is started when the header has
been parsed. So a starter is forked before the sandbox is entered. It knows the addresses that the user has named,
starts nothing but processes that reach those or what lies below, and ends when nobody is left who could ask. One that
starts what fetches is in a sandbox of its own. What writes has to mount, and enters one beside a process that does.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from typing import NoReturn

from tapfs.errors import ImageError, from_os_error
from tapfs.host.remote import messages
from tapfs.host.sandbox import rules
from tapfs.host.sandbox.confinement import Needs, enter, is_entered, is_switched_off
from tapfs.host.sandbox.filter import Calls

_CHANNEL = 3


def enter_beside(needs: Needs, addresses: Sequence[str], written: Sequence[str] = ()) -> None:
    """Enter the sandbox; from inside what lies at the addresses, or below them, can be fetched, and nothing else.

    What is `written` can be written, too. Be the only thread. Raises ImageError.
    """
    if not (is_switched_off() or is_entered()):
        if addresses:
            # The libraries that fetch read what the user has set up for them, and caches that are kept.
            confined = Needs(
                make=needs.make,
                anything=rules.READING,
                scratch=True,
                keeps_scratch=True,
                calls=Calls(network=True, programs=True),
                cache_bytes=None,
            )
            _begin(messages.FETCHER, confined, addresses)
        if written:
            _begin(messages.WRITER, None, written)
    enter(needs)


def _begin(module: str, needs: Needs | None, addresses: Sequence[str]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        child = os.fork()
    except OSError as error:
        raise from_os_error(error, path=None, op="start the process that starts others") from error
    if child == 0:
        _serve(theirs, module, needs, addresses)
    theirs.close()
    messages.use_starter(module, ours)


def _serve(channel: socket.socket, module: str, needs: Needs | None, addresses: Sequence[str]) -> NoReturn:
    """Start what is asked for until nobody is left who could ask."""
    code = 1
    try:
        for number in messages.ENDING_SIGNALS:  # it ends with the process that asks
            signal.signal(number, signal.SIG_IGN)
        os.setsid()
        os.chdir("/")
        void = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(void, descriptor)
        os.dup2(channel.fileno(), _CHANNEL)
        os.closerange(_CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
        asked = socket.socket(fileno=_CHANNEL)
        if needs is not None:
            enter(needs)
        most = messages.GIVEN[module] + 1
        while True:
            line, given, _, _ = socket.recv_fds(asked, messages.MESSAGE_BYTES, most)
            if not line:
                break
            try:
                if len(given) == most:
                    _start(module, line.decode(errors="replace"), given, addresses)
            finally:
                for descriptor in given:
                    os.close(descriptor)
        code = 0
    finally:
        os._exit(code)


def _start(module: str, name: str, given: Sequence[int], addresses: Sequence[str]) -> None:
    """Start a process; the last descriptor is for the answer."""
    with socket.socket(fileno=os.dup(given[-1])) as answers:
        try:
            started = messages.start(module, name, given[:-1], allowed=addresses)
            process = os.pidfd_open(started.number)
        except (ImageError, OSError) as error:
            messages.send(answers, messages.failed(error))
            return
        socket.send_fds(answers, [b"{}"], [process])
        os.close(process)
