"""The messages between the process that serves and one that takes the place of a killed fetching process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from tapfs.host.remote import messages
from tapfs.host.remote.address import Address
from tapfs.host.remote.fetcher import Fetcher
from tapfs.host.remote.fetching import Fetching
from tapfs.host.remote.kept_copy import KeptList
from tapfs.host.remote.options import USUAL
from tapfs.host.remote.source import Source

FACTS = {"size": 1 << 20, "identity": None, "modified": 0, "writable": False}
ADDRESS = "http://server.example/disk.raw"


class Peer(NamedTuple):
    """The other ends of the two sockets."""

    connection: socket.socket
    holes: socket.socket

    def restarts(self) -> None:
        """A killed process has a successor."""
        for each in self:
            messages.send(each, {"number": 0, "restarted": True})

    def told(self) -> list[dict[str, Any]]:
        """All messages that wait at the first socket."""
        found = list[dict[str, Any]]()
        while message := messages.receive(self.connection, wait=False):
            found.append(message)
        return found


@contextmanager
def served(
    monkeypatch: pytest.MonkeyPatch, process: messages.Started | None = None
) -> Generator[tuple[Fetching, Peer]]:
    """A `Fetching` whose process is this one, or is said to be another."""
    peers = list[Peer]()

    def start(_module: str, _name: str, given: Sequence[int]) -> messages.Started | None:
        theirs, _, holes = given
        peers.append(Peer(socket.socket(fileno=os.dup(theirs)), socket.socket(fileno=os.dup(holes))))
        messages.send(peers[0].connection, {"number": 1, "facts": FACTS, "tells_holes": True})
        return process

    monkeypatch.setattr(messages, "start_outside", start)
    served = Fetching(Address.known(ADDRESS), -1, USUAL)
    try:
        assert [each["op"] for each in peers[0].told()] == ["open"]
        yield served, peers[0]
    finally:
        served.close()
        for each in peers[0]:
            each.close()


def test_what_came_with_the_news_of_a_follower_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as (asker, peer):
        first, second = asker.begin(0, 512), asker.begin(512, 512)
        messages.send(peer.connection, {"number": first})
        peer.restarts()
        assert [each.number for each in asker.ended()] == [first]
        assert [(each["op"], each["number"]) for each in peer.told()[2:]] == [("open", second), ("fetch", second)]
        # One that was told twice answers twice.
        for number in (first, second, second):
            messages.send(peer.connection, {"number": number})
        assert [each.number for each in asker.ended()] == [second]


def test_a_follower_that_only_a_question_about_holes_meets_is_told_what_to_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served(monkeypatch) as (asker, peer):
        peer.restarts()
        messages.send(peer.holes, {"number": 1, "ranges": [[0, 512]], "until": 1024})
        assert list(asker.data_ranges(0, 1024)) == [(0, 512)]
        assert [each["op"] for each in peer.told()] == ["open"]


def test_a_follower_that_is_told_twice_opens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[Source]()

    def start(self: Fetcher, source: Source) -> None:
        opened.append(source)
        monkeypatch.setattr(self, "_source", source)

    monkeypatch.setattr(Fetcher, "_start", start)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    holes, their_holes = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, holes, their_holes:
        opening = {"number": 1, "op": "open", "address": ADDRESS, "options": asdict(USUAL), "facts": FACTS}
        for _ in range(2):
            messages.send(ours, opening)
        ours.shutdown(socket.SHUT_WR)
        Fetcher(theirs, -1, their_holes, again=True).serve()
    assert len(opened) == 1


def test_the_words_of_a_process_that_fetches_have_no_password_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[tuple[list[str], dict[str, str]]] = []

    def spawn(_program: str, words: list[str], environment: dict[str, str], **_: object) -> int:
        spawned.append((words, environment))
        return -1

    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(messages, "_left", set[int]())
    allowed = ["https://user:secret@server.example/"]
    messages.start(messages.FETCHER, "a disk", (), allowed=allowed)
    ((words, environment),) = spawned
    assert not [word for word in words if "secret" in word]
    assert json.loads(environment[messages.ALLOWED]) == allowed


@pytest.mark.parametrize("keeps", [False, True])
def test_a_process_that_another_one_has_started_is_let_go_of_once(
    monkeypatch: pytest.MonkeyPatch, *, keeps: bool
) -> None:
    process, ended = os.pipe()  # readable, as the descriptor of a process that has ended
    os.close(ended)
    with served(monkeypatch, messages.Started(0, 0, process)) as (fetching, _):
        if keeps:
            fetching.keep(cast("KeptList", SimpleNamespace(path="kept", head=b"{}")), 4096)
        fetching.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(process)
