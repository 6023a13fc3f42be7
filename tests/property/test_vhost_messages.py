"""Any bytes from a front end get an error or a right answer, and the next front end is served."""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tapfs
from tapfs.vhost.messages import Kind, MalformedError, read_header, read_payload
from tests import vhost_front_end as virtio
from tests.unit.vhost.served import Served
from tests.vhost_front_end import GUEST, Ring

_ALLOWED_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]

#: Numbers that are somewhere, and those that are near the ends of what they can be.
numbers = st.one_of(
    st.sampled_from((0, 1, 2, 8, 128, GUEST, virtio.USER, 4096, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1)),
    st.integers(0, 2**64 - 1),
)
payloads = st.one_of(
    st.binary(max_size=64),
    st.lists(numbers, max_size=9).map(lambda found: struct.pack(f"={len(found)}Q", *found)),
    st.lists(st.integers(0, 200), max_size=9).map(lambda found: struct.pack(f"={len(found)}I", *found)),
)
said = st.lists(st.tuples(st.sampled_from(tuple(Kind)), payloads, st.integers(0, 2), st.booleans()), max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=12, max_size=12), st.sampled_from(tuple(Kind)), payloads)
def test_the_codec_reads_or_refuses(header: bytes, kind: Kind, payload: bytes) -> None:
    for read in (lambda: read_header(header), lambda: read_payload(kind, payload)):
        with suppress(MalformedError):
            read()


def test_any_messages_leave_the_next_front_end_served() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "disk.qcow2")
        tapfs.create(path, "qcow2", 1 << 20)
        with Served(tapfs.open(path, format="qcow2", writable=True)) as served:

            @settings(max_examples=15, deadline=None, suppress_health_check=_ALLOWED_CHECKS)
            @given(said)
            def check(messages: list[tuple[Kind, bytes, int, bool]]) -> None:
                converse(served, messages)

            check()


def converse(served: Served, messages: list[tuple[Kind, bytes, int, bool]]) -> None:
    front_end = served.connect()
    front_end.negotiate()
    Ring(front_end).set_up()
    with suppress(EOFError, OSError):
        for kind, payload, descriptors, acknowledged in messages:
            sent = [front_end.event() if kind is not Kind.SET_MEM_TABLE else front_end.memory_file] * descriptors
            front_end.send(kind, payload, sent, flags=9 if acknowledged else 1)
    front_end.close()
    served.wait_until_gone()
    front_end = served.connect()
    front_end.negotiate()
    ring = Ring(front_end)
    ring.set_up()
    data = os.urandom(512)
    ring.write(5, data)
    assert ring.read(5, 512) == data
    front_end.close()
    served.wait_until_gone()
