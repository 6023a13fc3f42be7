"""A disk behind the NBD server is an array of bytes, in every style of replies; any bytes get an error or an answer.

Requests go to the native server of this process. The client is a second reader of the protocol (tests/nbd_client.py).
"""

from __future__ import annotations

import errno
import socket
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs.kernel.nbd_server import decode
from tests import nbd_client as nbd
from tests.unit.nbd.served import Served

SIZE = (3 << 20) + 1536

_ALLOWED_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]

offsets = st.one_of(st.integers(0, SIZE), st.integers(0, SIZE // 4096).map(lambda number: number * 4096))
lengths = st.sampled_from((0, 1, 511, 4096, 65536, 100_000, 1 << 20, (1 << 20) + 1, 3 << 20))
requests = st.lists(
    st.tuples(
        st.sampled_from((nbd.READ, nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS, nbd.FLUSH, nbd.CACHE)),
        offsets,
        lengths,
        st.integers(0, 63),
    ),
    max_size=12,
)
ALLOWED = {
    nbd.READ: nbd.FUA | nbd.DF,
    nbd.WRITE: nbd.FUA | nbd.PAYLOAD_LEN,
    nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
    nbd.BLOCK_STATUS: nbd.FUA | nbd.REQ_ONE,
}


def expected_error(command: int, offset: int, length: int, flags: int) -> int:
    if flags & ~ALLOWED.get(command, nbd.FUA):
        return errno.EINVAL
    if command == nbd.FLUSH:
        return 0
    if offset + length > SIZE:
        return errno.ENOSPC if command in {nbd.WRITE, nbd.WRITE_ZEROES} else errno.EINVAL
    if command == nbd.READ and flags & nbd.DF and length > 1 << 20:
        return errno.EOVERFLOW
    if command == nbd.BLOCK_STATUS and length == 0:
        return errno.EINVAL
    return errno.EOPNOTSUPP if flags & nbd.NO_HOLE and flags & nbd.FAST_ZERO else 0


@pytest.mark.parametrize("style", [nbd.SIMPLE, nbd.STRUCTURED, nbd.EXTENDED])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_served_disk_is_an_array_of_bytes(style: int, kind: str) -> None:
    @settings(max_examples=12, deadline=None, suppress_health_check=_ALLOWED_CHECKS)
    @given(requests, st.integers(1, 255))
    def check(asked: list[tuple[int, int, int, int]], fill: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image")
            tapfs.create(path, kind, SIZE)
            compare(path, kind, style, asked, fill)

    check()


def compare(path: Path, kind: str, style: int, asked: list[tuple[int, int, int, int]], fill: int) -> None:
    model = bytearray(SIZE)
    with Served(tapfs.open(path, format=kind, writable=True)) as server:
        client = server.connect(style)
        for number, (command, offset, length, some_flags) in enumerate(asked):
            # Mostly flags that a command has, so that most requests are done.
            flags = some_flags & ALLOWED.get(command, nbd.FUA) if some_flags % 8 else some_flags
            if command == nbd.BLOCK_STATUS and style == nbd.SIMPLE:
                continue
            if style != nbd.EXTENDED or command != nbd.WRITE:
                flags &= ~nbd.PAYLOAD_LEN
            data = bytes([(fill + number) % 256]) * length if command == nbd.WRITE else b""
            answer = client.ask(command, offset, length, data, flags)
            error = expected_error(command, offset, length, flags)
            assert answer.error == error, (command, offset, length, flags)
            end = offset + length
            if error:
                continue
            if command == nbd.READ:
                assert answer.whole() == model[offset:end]
            elif command == nbd.WRITE:
                model[offset:end] = data
            elif command == nbd.WRITE_ZEROES:
                model[offset:end] = bytes(length)
            elif command == nbd.TRIM and length:
                model[offset:end] = client.ask(nbd.READ, offset, length).whole()
            elif command == nbd.BLOCK_STATUS:
                check_states(answer.states[0], model, offset, end, single=bool(flags & nbd.REQ_ONE))
        assert client.ask(nbd.READ, 0, SIZE).whole() == model
        client.close()
    with tapfs.open(path, format=kind) as image:
        assert image.read(0, SIZE) == model


def check_states(states: list[tuple[int, int]], model: bytearray, offset: int, end: int, *, single: bool) -> None:
    assert states
    assert len(states) == 1 or not single
    for length, bits in states:
        assert length > 0
        if bits & 2:
            assert not any(model[offset : offset + length])
        offset += length
    assert offset <= end


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40), st.booleans())
def test_the_codec_reads_a_request_or_says_that_it_is_none(message: bytes, extended: bool) -> None:  # noqa: FBT001
    magic, form = (0x21E41C71, ">IHHQQQ") if extended else (0x25609513, ">IHHQQI")
    size = struct.calcsize(form)
    for text in (message, magic.to_bytes(4, "big") + message):
        if len(text) >= 4 and int.from_bytes(text[:4], "big") != magic:
            with pytest.raises(ValueError, match="no request"):
                decode(text, extended=extended)
        elif len(text) < size:
            assert decode(text, extended=extended) is None
        else:
            assert decode(text, extended=extended) == (size, struct.unpack(form, text[:size])[1:])


@settings(max_examples=60, deadline=None, suppress_health_check=_ALLOWED_CHECKS)
@given(
    st.lists(st.one_of(st.binary(max_size=64), requests.map(repr).map(str.encode), st.just(b"%")), max_size=6),
    st.sampled_from((0, 1, 2)),
)
def test_a_stream_of_any_bytes_ends_and_leaves_others_alone(pieces: list[bytes], style: int) -> None:
    """Each `%` stands for a whole request, so that the nonsense comes after requests, too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        path.write_bytes(b"x" * 8192)
        with Served(tapfs.open(path, format="raw")) as server:
            other, hostile = server.connect(nbd.STRUCTURED), server.connect(style)
            real = hostile.request_bytes(nbd.READ, 7, 4096, 4096)
            hostile.connection.sendall(b"".join(real if piece == b"%" else piece for piece in pieces))
            hostile.connection.shutdown(socket.SHUT_WR)
            while hostile.connection.recv(65536):
                pass
            assert other.ask(nbd.READ, 0, 8192).whole() == b"x" * 8192
            other.close()
            hostile.close()
            server.wait_until_idle()
