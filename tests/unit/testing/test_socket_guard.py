"""The guard of the suite against descriptors that are closed twice."""

from __future__ import annotations

import os
import socket

from tests.socket_guard import lost_descriptors


def test_a_socket_whose_descriptor_another_one_closed_is_told_once() -> None:
    ours, theirs = socket.socketpair()
    assert lost_descriptors() == []
    os.close(ours.fileno())
    (told,) = lost_descriptors()
    assert "cannot be used: Bad file descriptor" in told
    assert "test_socket_guard.py" in told
    assert lost_descriptors() == []
    ours.detach()
    theirs.close()


def test_a_descriptor_that_another_socket_has_taken_is_told() -> None:
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_INET) as other:
        os.dup2(other.fileno(), ours.fileno())
        (told,) = lost_descriptors()
    assert "is a socket of family 2" in told
    ours.close()
    theirs.close()


def test_closed_and_detached_sockets_are_right() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    number = theirs.detach()
    assert lost_descriptors() == []
    os.close(number)
