"""The engine's FUSE server against a kernel and a session that the test plays."""

from __future__ import annotations

import errno
import os
import random
import select
import struct
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.kernel.fuse_server import ParkedRequest, Request
from tapfs.kernel.parked import Queue
from tests.unit.engine.engine_disks import GRANULE, UNIT, Disk, host, pattern
from tests.unit.fuse import fuse_device as fuse
from tests.unit.fuse.fuse_device import FakeKernel

SIZE = 8 * GRANULE
#: Inodes: the whole disk, and a window of it.
DISK, PART = 2, 7
PART_START, PART_SIZE = GRANULE + 512, 2 * GRANULE
THREADS = 2

KEEP, PUNCH, ZERO = 1, 2, 16


def flat(disk: Disk, folder: Path, *, writable: bool) -> Path:
    """An identity layer."""
    path = host(folder, "flat", pattern(SIZE))
    disk.layer(path, size=SIZE, identity=True, writable=writable)
    return path


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as made:
        yield made


def serving(disk: Disk, *, writable: bool = True, threads: int = THREADS) -> FakeKernel:
    """A server with both nodes, started."""
    kernel = FakeKernel(disk)
    kernel.server.add_node(PART, PART_START, PART_SIZE, writable=writable)
    kernel.server.add_node(DISK, 0, SIZE, writable=writable)
    kernel.server.start(threads)
    return kernel


def parked_of(kernel: FakeKernel, queue: Queue) -> ParkedRequest:
    (parked,) = kernel.server.next_parked(queue)
    return parked


def test_reads(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=False)
    content = pattern(SIZE)
    with serving(disk, writable=False) as kernel:
        choice = random.Random(5)
        for _ in range(200):
            offset, length = choice.randrange(SIZE + 5000), choice.randrange(70_000)
            assert kernel.ask(fuse.READ, DISK, fuse.read_body(offset, length)).body == content[offset:][:length]
            window = content[PART_START : PART_START + PART_SIZE]
            assert kernel.ask(fuse.READ, PART, fuse.read_body(offset, length)).body == window[offset:][:length]
        assert kernel.ask(fuse.READ, DISK, fuse.read_body((1 << 64) - 1, 1 << 20))[1:] == (0, b"")
        assert kernel.server.statistics().parked == 0


def test_writes(disk: Disk, tmp_path: Path) -> None:
    path = flat(disk, tmp_path, writable=True)
    model = bytearray(pattern(SIZE))
    with serving(disk) as kernel:
        choice = random.Random(6)
        assert kernel.server.last_write_ns == 0
        for _ in range(200):
            node, start, size = choice.choice([(DISK, 0, SIZE), (PART, PART_START, PART_SIZE)])
            offset, data = choice.randrange(size), choice.randbytes(choice.randrange(1, 9000))
            taken = min(len(data), size - offset)
            answer = kernel.ask(fuse.WRITE, node, fuse.write_body(offset, data))
            assert (answer.error, struct.unpack("=II", answer.body)[0]) == (0, taken)
            model[start + offset : start + offset + taken] = data[:taken]
        assert kernel.ask(fuse.WRITE, PART, fuse.write_body(PART_SIZE, b"x")).error == errno.ENOSPC
        assert kernel.server.last_write_ns > 0
        assert kernel.server.statistics().writes == 200
    assert path.read_bytes() == model


def test_large_messages(disk: Disk, tmp_path: Path) -> None:
    size = 2 << 20
    content = os.urandom(size)
    disk.layer(host(tmp_path, "flat", content), size=size, identity=True, writable=True)
    with FakeKernel(disk) as kernel:
        kernel.server.add_node(DISK, 0, size, writable=True)
        kernel.server.start(1)
        length = kernel.room
        assert kernel.ask(fuse.WRITE, DISK, fuse.write_body(512, bytes(length))).error == 0
        answer = kernel.ask(fuse.READ, DISK, fuse.read_body(0, length))
        assert answer.body == (content[:512] + bytes(length))[:length]


def test_malformed_requests(disk: Disk, tmp_path: Path) -> None:
    path = flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        for opcode in (fuse.OPEN, fuse.READ, fuse.WRITE, fuse.FSYNC, fuse.FLUSH, fuse.FALLOCATE, fuse.LSEEK):
            for length in range(4):
                assert kernel.ask(opcode, DISK, bytes(length)).error == errno.EINVAL, opcode
            assert kernel.ask(opcode, DISK, bytes(64), length=10_000).error == errno.EINVAL
            assert kernel.ask(opcode, DISK, bytes(64), length=0).error == errno.EINVAL
        wrong = {
            (fuse.READ, fuse.read_body(0, (1 << 20) + 1)): errno.EINVAL,
            (fuse.READ, fuse.read_body(0, (1 << 32) - 1)): errno.EINVAL,
            (fuse.WRITE, fuse.write_body(0, b"abc", 4)): errno.EINVAL,
            (fuse.WRITE, fuse.write_body(0, b"abc", (1 << 32) - 1)): errno.EINVAL,
            (fuse.WRITE, fuse.write_body((1 << 64) - 1, b"abc")): errno.ENOSPC,
            (fuse.FALLOCATE, fuse.fallocate_body(0, 0, PUNCH | KEEP)): errno.EINVAL,
            (fuse.FALLOCATE, fuse.fallocate_body(4096, (1 << 64) - 4096, PUNCH | KEEP)): errno.EINVAL,
            (fuse.FALLOCATE, fuse.fallocate_body(1 << 63, 1, PUNCH | KEEP)): errno.EINVAL,
            (fuse.FALLOCATE, fuse.fallocate_body(0, 4096, 0)): errno.EOPNOTSUPP,
            (fuse.FALLOCATE, fuse.fallocate_body(0, 4096, KEEP)): errno.EOPNOTSUPP,
            (fuse.FALLOCATE, fuse.fallocate_body(0, 4096, 0xFFFFFFFF)): errno.EOPNOTSUPP,
            (fuse.FALLOCATE, fuse.fallocate_body(SIZE, 1, ZERO)): errno.ENOSPC,
            (fuse.FALLOCATE, fuse.fallocate_body(SIZE, 4096, PUNCH | KEEP)): 0,
            (fuse.LSEEK, fuse.lseek_body(SIZE, os.SEEK_DATA)): errno.ENXIO,
            (fuse.LSEEK, fuse.lseek_body((1 << 64) - 1, os.SEEK_HOLE)): errno.ENXIO,
            (fuse.LSEEK, fuse.lseek_body(0, 9)): errno.EINVAL,
        }
        for (opcode, body), number in wrong.items():
            assert kernel.ask(opcode, DISK, body).error == number, (opcode, body)
        # Too short for a header: nothing to answer, and the next request is served.
        kernel.device.send(b"short")
        assert kernel.ask(fuse.READ, DISK, fuse.read_body(0, 3)).body == pattern(3)
        assert kernel.server.statistics().parked == 0
    assert path.read_bytes() == pattern(SIZE)


def test_read_only(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=False)
    with serving(disk, writable=False) as kernel:
        assert kernel.ask(fuse.OPEN, DISK, fuse.open_body(os.O_RDWR)).error == errno.EROFS
        assert kernel.ask(fuse.WRITE, DISK, fuse.write_body(0, b"x")).error == errno.EROFS
        punch = fuse.fallocate_body(0, GRANULE, PUNCH | KEEP)
        assert kernel.ask(fuse.FALLOCATE, DISK, punch).error == errno.EROFS
        assert kernel.ask(fuse.FSYNC, DISK, fuse.fsync_body()).error == 0
        keep_cache = 2
        assert struct.unpack("=QII", kernel.ask(fuse.OPEN, DISK, fuse.open_body(0)).body) == (0, keep_cache, 0)
        with pytest.raises(ImageError) as caught:
            kernel.server.add_node(9, 0, SIZE, writable=True)
        assert caught.value.kind is ErrorKind.READ_ONLY


def test_a_durable_write_to_a_direct_handle_is_answered_when_it_is_flushed(disk: Disk, tmp_path: Path) -> None:
    path = flat(disk, tmp_path, writable=True)
    direct, written = 3, struct.pack("=II", 3, 0)
    with serving(disk) as kernel:
        for number, failure in enumerate((0, errno.EIO)):
            body = fuse.write_body(number, b"new", handle=direct, flags=os.O_RDWR | os.O_DSYNC)
            sent = kernel.send(fuse.WRITE, DISK, body)
            parked = parked_of(kernel, Queue.SYNCS)
            assert parked.request is Request.SYNC
            assert path.read_bytes()[number : number + 3] == b"new"
            parked.fail(failure) if failure else parked.complete()
            assert kernel.answer() == (sent, failure, b"" if failure else written)
        # The kernel sends a FSYNC itself for other handles, and nobody waits for a flush without the flag.
        for handle, flags in ((1, os.O_DSYNC), (direct, os.O_RDWR)):
            body = fuse.write_body(0, b"new", handle=handle, flags=flags)
            assert kernel.ask(fuse.WRITE, DISK, body).body == written


def test_nodes_lie_inside_the_disk(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with FakeKernel(disk) as kernel:
        for start, size in ((0, SIZE + 1), (SIZE, 1), ((1 << 64) - 1, 2), (1, (1 << 64) - 1)):
            with pytest.raises(ImageError):
                kernel.server.add_node(DISK, start, size, writable=False)
        kernel.server.add_node(DISK, SIZE, 0, writable=False)
        with pytest.raises(ImageError):
            kernel.server.add_node(DISK, 0, SIZE, writable=False)  # the inode is taken


def test_what_is_no_data_goes_to_the_session(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        for opcode, node in ((fuse.LOOKUP, 1), (fuse.GETATTR, DISK), (fuse.READ, 3), (fuse.OPEN, 3), (9999, DISK)):
            body = b"name\0" * opcode.bit_length()
            sent = kernel.send(opcode, node, body)
            message = kernel.forwarded()
            assert message.endswith(body)
            assert unmarked(message) == sent
            kernel.session_answers(fuse.unique_of(message), b"found", 0)
            assert kernel.answer() == (sent, 0, b"found")
        sent = kernel.send(fuse.LOOKUP, 1, b"nobody\0")
        kernel.session_answers(fuse.unique_of(kernel.forwarded()), error=errno.ENOENT)
        assert kernel.answer() == (sent, errno.ENOENT, b"")


def unmarked(message: bytes) -> int:
    """The kernel's number: the top byte says which thread took the request."""
    return fuse.unique_of(message) & (1 << 56) - 1


def test_one_message_at_a_time(disk: Disk, tmp_path: Path) -> None:
    """The session takes whatever a read brings for one message, however many wait in the socket."""
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        names = [b"x" * (number * 97 % 30_000) + b"\0" for number in range(100)]
        sent = [kernel.send(fuse.LOOKUP, 1, name) for name in names]
        seen: set[int] = set()
        for _ in sent:
            message = kernel.forwarded()  # asserts that it is one whole message
            seen.add(unmarked(message))
        assert seen == set(sent)
        assert not select.select([kernel.session], [], [], 0)[0]
        # Answers may come in any order, many in one piece or one in many.
        answers = b"".join(struct.pack("=IiQ", 16, -number % 100, unique) for number, unique in enumerate(sent))
        for at in range(0, len(answers), 37):
            kernel.session.sendall(answers[at : at + 37])
        assert {kernel.answer().unique for _ in sent} == set(sent)


def test_data_goes_on_while_the_session_sleeps(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        for number in range(50):
            kernel.send(fuse.LOOKUP, 1, b"%d\0" % number)
        for _ in range(50):
            assert kernel.ask(fuse.READ, DISK, fuse.read_body(0, 10)).body == pattern(10)


def test_what_has_no_answer(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        kernel.send(fuse.INTERRUPT, 0, bytes(8))
        forget = kernel.send(fuse.FORGET, DISK, bytes(8))
        assert unmarked(kernel.forwarded()) == forget  # and not the interrupt
        kernel.send(fuse.BATCH_FORGET, 0, bytes(40_000))  # dropped: the session could not take it whole
        assert kernel.ask(fuse.SETXATTR, DISK, bytes(40_000)).error == errno.EMSGSIZE
        assert kernel.silent()


def test_session_gone(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        waiting = [kernel.send(fuse.LOOKUP, 1, b"%d\0" % number) for number in range(3)]
        kernel.session.close()
        # What was on its way is lost with the session; whoever waits or comes later is told.
        select.select([kernel.server.ended_descriptor], [], [], 20)
        while not kernel.silent():
            assert kernel.answer().unique in waiting
        assert kernel.ask(fuse.LOOKUP, 1, b"x\0").error == errno.EIO
        kernel.send(fuse.FORGET, DISK, bytes(8))
        assert kernel.ask(fuse.READ, DISK, fuse.read_body(0, 3)).body == pattern(3)
        assert select.select([kernel.server.ended_descriptor], [], [], 20)[0]


@pytest.mark.parametrize("garbage", [struct.pack("=IiQ", 3, 0, 2), struct.pack("=IiQ", 0xFFFFFFFF, 0, 2)])
def test_session_talks_nonsense(disk: Disk, tmp_path: Path, garbage: bytes) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        kernel.session.sendall(garbage)
        assert select.select([kernel.server.ended_descriptor], [], [], 20)[0]
        assert kernel.ask(fuse.LOOKUP, 1, b"x\0").error == errno.EIO


def test_kernel_gone(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        assert not select.select([kernel.server.ended_descriptor], [], [], 0)[0]
        kernel.device.close()
        assert select.select([kernel.server.ended_descriptor], [], [], 20)[0]


def test_init_is_amended(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    everything = 0x7FFFFFFF
    atomic_truncation, auto_inval, writeback, max_pages, ext = 1 << 3, 1 << 12, 1 << 16, 1 << 22, 1 << 30
    with serving(disk) as kernel:
        sent = kernel.send(fuse.INIT, 0, fuse.init_body(everything, 0xFF))
        message = kernel.forwarded()
        libfuse = struct.pack(
            "=IIIIHHIIHHI28x", 7, 38, 131072, auto_inval | atomic_truncation | 1, 0, 0, 131072, 1, 0, 0, 0
        )
        kernel.session_answers(fuse.unique_of(message), libfuse)
        answer = kernel.answer()
        assert (answer.unique, answer.error, len(answer.body)) == (sent, 0, 64)
        major, _, _, flags, _, _, max_write, _, pages, _, flags2, depth = struct.unpack_from(
            "=IIIIHHIIHHII", answer.body
        )
        assert major == 7
        assert flags & max_pages
        assert flags & ext
        assert not flags & (auto_inval | writeback | atomic_truncation)
        assert (max_write, pages) == (1 << 20, 256)
        assert flags2 & 1 << 4  # shared mappings of files that are opened with O_DIRECT
        assert not flags2 & 1 << 5  # no passthrough: no node has a file
        assert depth == 0
        direct = kernel.ask(fuse.OPEN, DISK, fuse.open_body(os.O_RDWR | os.O_DIRECT))
        assert struct.unpack("=QII", direct.body)[:2] == (3, 1 | 1 << 6)
        assert struct.unpack("=QII", kernel.ask(fuse.OPEN, DISK, fuse.open_body(os.O_RDWR)).body)[:2] == (1, 0)


def test_old_kernel_gets_what_it_knows(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        kernel.send(fuse.INIT, 0, struct.pack("=IIII", 7, 19, 131072, 0x7))
        message = kernel.forwarded()
        libfuse = struct.pack("=IIIIHHI", 7, 19, 131072, 1, 0, 0, 131072)
        kernel.session_answers(fuse.unique_of(message), libfuse)
        body = kernel.answer().body
        assert len(body) == 24
        assert struct.unpack("=IIIIHHI", body)[3:4] + struct.unpack("=IIIIHHI", body)[6:] == (1, 131072)
        assert struct.unpack("=QII", kernel.ask(fuse.OPEN, DISK, fuse.open_body(os.O_RDWR | os.O_DIRECT)).body)[1] == 0


# Parking


def mapped(disk: Disk, folder: Path, *, writable: bool = True) -> Path:
    """A layer with a map that nobody has installed yet."""
    path = host(folder, "mapped", pattern(4096) + pattern(SIZE, 3))
    disk.layer(path, size=SIZE, writable=writable)
    return path


def install(disk: Disk, offset: int, kind: Kind) -> None:
    start = offset - offset % UNIT
    disk.install(0, [Extent(start, UNIT, kind, host_offset=4096 + start, in_place=kind is Kind.DATA)])


def test_read_waits_for_its_map(disk: Disk, tmp_path: Path) -> None:
    mapped(disk, tmp_path)
    with serving(disk) as kernel:
        length = UNIT + GRANULE
        sent = kernel.send(fuse.READ, DISK, fuse.read_body(GRANULE, length))
        parked = parked_of(kernel, Queue.MOVES)
        assert (parked.request, parked.offset, parked.length) == (Request.READ, GRANULE, length)
        assert not parked.outcome().needs_reservation
        assert kernel.silent()
        install(disk, GRANULE, Kind.DATA)
        assert not parked.resume()
        # What is there is there: it goes on in the second unit.
        assert (parked.offset, parked.length) == (UNIT, 2 * GRANULE)
        install(disk, UNIT, Kind.DATA)
        assert parked.resume()
        assert kernel.answer() == (sent, 0, pattern(SIZE, 3)[GRANULE : GRANULE + length])
        parked.fail(errno.EIO)  # too late, and of no effect
        assert kernel.silent()


def test_write_waits_for_its_place(disk: Disk, tmp_path: Path) -> None:
    path = mapped(disk, tmp_path)
    with serving(disk) as kernel:
        data = os.urandom(3 * GRANULE)
        sent = kernel.send(fuse.WRITE, DISK, fuse.write_body(UNIT - GRANULE, data))
        parked = parked_of(kernel, Queue.MOVES)
        install(disk, 0, Kind.DATA)
        install(disk, UNIT, Kind.UNALLOCATED)
        if parked.resume():
            # A host that cannot tell whether it waits: others have gone on with it, and parked it again.
            parked = parked_of(kernel, Queue.WRITES)
        outcome = parked.outcome()
        assert outcome.needs_reservation
        assert (parked.offset, parked.length) == (UNIT, 2 * GRANULE)
        assert parked.data == data[GRANULE:]
        # The next request goes through another buffer.
        assert kernel.ask(fuse.WRITE, DISK, fuse.write_body(0, b"other")).error == 0
        assert parked.data == data[GRANULE:]
        assert kernel.silent()
        parked.complete()
        answer = kernel.answer()
        assert (answer.unique, answer.error) == (sent, 0)
        assert struct.unpack("=II", answer.body)[0] == len(data)
    assert path.read_bytes()[4096 + UNIT - GRANULE :][:GRANULE] == data[:GRANULE]


def test_host_error_is_parked_for_the_log(disk: Disk, tmp_path: Path) -> None:
    path = flat(disk, tmp_path, writable=True)
    with serving(disk) as kernel:
        os.truncate(path, GRANULE)
        sent = kernel.send(fuse.READ, DISK, fuse.read_body(GRANULE, 10))
        parked = parked_of(kernel, Queue.MOVES)
        with pytest.raises(ImageError) as caught:
            parked.outcome()
        assert caught.value.path == str(path)
        parked.fail(caught.value.errno)
        assert kernel.answer() == (sent, errno.EIO, b"")


def test_what_waits_for_the_disk_has_its_own_queue(disk: Disk, tmp_path: Path) -> None:
    mapped(disk, tmp_path)
    cases: list[tuple[int, bytes, Request, int, int]] = [
        (fuse.FSYNC, fuse.fsync_body(), Request.SYNC, PART_START, 0),
        (fuse.FLUSH, fuse.flush_body(1), Request.SYNC, PART_START, 0),
        (
            fuse.FALLOCATE,
            fuse.fallocate_body(100, SIZE, PUNCH | KEEP),
            Request.ZERO,
            PART_START + 100,
            PART_SIZE - 100,
        ),
        (fuse.FALLOCATE, fuse.fallocate_body(0, 100, ZERO), Request.ZERO, PART_START, 100),
        (fuse.LSEEK, fuse.lseek_body(5, os.SEEK_DATA), Request.SEEK_DATA, PART_START + 5, PART_SIZE - 5),
        (fuse.LSEEK, fuse.lseek_body(5, os.SEEK_HOLE), Request.SEEK_HOLE, PART_START + 5, PART_SIZE - 5),
    ]
    with serving(disk) as kernel:
        kernel.send(fuse.READ, DISK, fuse.read_body(0, 1))  # in the other queue
        kernel.send(fuse.LSEEK, PART, fuse.lseek_body(0, os.SEEK_DATA))
        slow = parked_of(kernel, Queue.OTHERS)  # and nothing waits behind one that takes long
        for opcode, body, request, offset, length in cases:
            sent = kernel.send(opcode, PART, body)
            parked = parked_of(kernel, Queue.SYNCS if request is Request.SYNC else Queue.OTHERS)
            assert (parked.request, parked.offset, parked.length) == (request, offset, length)
            parked.complete(PART_START + 77)
            answer = kernel.answer()
            assert (answer.unique, answer.error) == (sent, 0)
            assert answer.body == (struct.pack("=Q", 77) if opcode == fuse.LSEEK else b"")
        slow.fail(errno.EIO)
        assert kernel.answer().error == errno.EIO
        assert kernel.ask(fuse.FLUSH, PART, fuse.flush_body(0)).error == 0  # by a reader
        assert parked_of(kernel, Queue.MOVES).request is Request.READ


def test_many_parked_writes(disk: Disk, tmp_path: Path) -> None:
    """More than there are buffers: the rest waits in the kernel, and none is lost."""
    path = mapped(disk, tmp_path)
    with serving(disk) as kernel:
        count, room = 250, 128 + THREADS
        data = [bytes([number + 1]) * 100 for number in range(count)]
        sender = threading.Thread(
            target=lambda: [kernel.send(fuse.WRITE, DISK, fuse.write_body(n * 100, data[n])) for n in range(count)]
        )
        sender.start()
        held = [parked_of(kernel, Queue.MOVES) for _ in range(room)]
        assert kernel.server.statistics().parked == room
        for unit in range(0, SIZE, UNIT):
            install(disk, unit, Kind.DATA)
        for parked in held:
            assert parked.resume()
        assert sorted(kernel.answer().error for _ in range(count)) == [0] * count
        sender.join()
        assert kernel.server.statistics().parked == room
    assert path.read_bytes()[4096 : 4096 + count * 100] == b"".join(data)


def test_what_is_parked_can_be_interrupted(disk: Disk, tmp_path: Path) -> None:
    mapped(disk, tmp_path)
    with serving(disk, threads=1) as kernel:  # one thread, so the requests keep their order
        seeks = [kernel.send(fuse.LSEEK, DISK, fuse.lseek_body(number, os.SEEK_DATA)) for number in range(3)]
        first, other = (parked_of(kernel, Queue.OTHERS) for _ in range(2))
        assert [first.offset, other.offset] == [0, 1]
        assert not first.given_up
        kernel.send(fuse.INTERRUPT, 0, struct.pack("=Q", 1 << 40))  # a number that nobody has
        kernel.send(fuse.INTERRUPT, 0, b"")
        for unique in (seeks[0], seeks[2]):  # one that was taken, and one that waits
            kernel.send(fuse.INTERRUPT, 0, struct.pack("=Q", unique))
        assert kernel.ask(fuse.FLUSH, DISK, fuse.flush_body(0)).error == 0  # behind them
        third = parked_of(kernel, Queue.OTHERS)
        assert (first.given_up, other.given_up, third.given_up) == (True, False, True)
        for parked, unique in ((first, seeks[0]), (third, seeks[2])):
            parked.fail(errno.EINTR)
            assert kernel.answer()[:2] == (unique, errno.EINTR)
        other.complete(77)
        assert kernel.answer().unique == seeks[1]
        # Nobody waits for what is asked of a server that stops.
        kernel.send(fuse.LSEEK, DISK, fuse.lseek_body(0, os.SEEK_HOLE))
        last = parked_of(kernel, Queue.OTHERS)
        kernel.server.stop()
        assert last.given_up
        last.fail(errno.EINTR)


def test_parked_reads_keep_nobody_waiting(disk: Disk, tmp_path: Path) -> None:
    """They have no buffers: however many wait for their maps, the rest of the mount is served."""
    mapped(disk, tmp_path)
    with serving(disk) as kernel:
        count = 400
        sent = [kernel.send(fuse.READ, DISK, fuse.read_body(number % SIZE, 100)) for number in range(count)]
        lookup = kernel.send(fuse.LOOKUP, 1, b"name\0")
        message = kernel.forwarded()
        assert unmarked(message) == lookup
        kernel.session_answers(fuse.unique_of(message))
        assert kernel.answer().unique == lookup
        held = [parked_of(kernel, Queue.MOVES) for _ in range(count)]
        for unit in range(0, SIZE, UNIT):
            install(disk, unit, Kind.DATA)
        # More than there are buffers are in hand at once; some are answered here, the others by the mover.
        for parked in held:
            assert parked.resume()
        answers = {answer.unique: answer.body for answer in (kernel.answer() for _ in range(count))}
        assert answers == {unique: pattern(SIZE, 3)[number % SIZE :][:100] for number, unique in enumerate(sent)}


def test_stop_fails_what_nobody_took(disk: Disk, tmp_path: Path) -> None:
    mapped(disk, tmp_path)
    with serving(disk) as kernel:
        taken = kernel.send(fuse.READ, DISK, fuse.read_body(0, 1))
        parked = parked_of(kernel, Queue.MOVES)
        left = {kernel.send(fuse.WRITE, DISK, fuse.write_body(0, b"x")), kernel.send(fuse.FSYNC, DISK, bytes(16))}
        while kernel.server.statistics().parked < 3:
            pass
        waiting = threading.Thread(target=lambda: results.append(kernel.server.next_parked(Queue.MOVES)))
        results: list[object] = []
        kernel.server.stop()
        waiting.start()
        waiting.join()
        assert results == [[]]
        answers = [kernel.answer() for _ in left]
        assert {answer.unique for answer in answers} == left
        assert {answer.error for answer in answers} == {errno.EIO}
        install(disk, 0, Kind.DATA)
        assert parked.resume()
        assert kernel.answer() == (taken, 0, pattern(1, 3))


def test_stop_wakes_who_waits(disk: Disk, tmp_path: Path) -> None:
    mapped(disk, tmp_path)
    for _ in range(20):
        with serving(disk) as kernel:
            waiting = [threading.Thread(target=kernel.server.next_parked, args=(queue,)) for queue in Queue]
            for thread in waiting:
                thread.start()
            kernel.server.stop()
            for thread in waiting:
                thread.join(20)
                assert not thread.is_alive()


def test_nothing_is_left(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    with serving(disk):
        pass
    before = fuse.descriptors(), threading.active_count(), len(os.listdir("/proc/self/task"))
    for _ in range(10):
        with serving(disk) as kernel:
            kernel.send(fuse.LOOKUP, 1, b"x\0")
            kernel.ask(fuse.READ, DISK, fuse.read_body(0, 10))
    assert (fuse.descriptors(), threading.active_count(), len(os.listdir("/proc/self/task"))) == before


def test_bad_thread_counts(disk: Disk, tmp_path: Path) -> None:
    flat(disk, tmp_path, writable=True)
    for count in (0, 17, 1 << 31):
        with FakeKernel(disk) as kernel, pytest.raises(ImageError):
            kernel.server.start(count)


# Files that are made of pieces of the disk

MADE = 11
#: Where the file has pieces of the disk, their offsets there, their lengths; metadata lies between them.
PIECES = (array("Q", [1000, 5096, 9196]), array("Q", [GRANULE, 3, UNIT + 100]), array("Q", [4096, 100, 2 * GRANULE]))
MADE_SIZE = 9196 + 2 * GRANULE + 700


def made_file() -> tuple[int, bytes]:
    """The metadata in a file in memory, which ends before the file does, and the whole file."""
    metadata = os.memfd_create("metadata")
    text = pattern(9300, 5)
    os.pwrite(metadata, text, 0)
    content = bytearray(text.ljust(MADE_SIZE, b"\0"))
    disk = pattern(4096 + SIZE, 3)[:SIZE]
    for start, offset, length in zip(*PIECES, strict=True):
        content[start : start + length] = disk[offset : offset + length]
    return metadata, bytes(content)


@pytest.fixture
def made() -> Iterator[tuple[int, bytes]]:
    metadata, content = made_file()
    yield metadata, content
    os.close(metadata)


def test_a_file_of_pieces_is_the_session_s_until_it_is_made(
    disk: Disk, tmp_path: Path, made: tuple[int, bytes]
) -> None:
    metadata, content = made
    disk.layer(host(tmp_path, "flat", pattern(SIZE, 3)), size=SIZE, identity=True)
    with FakeKernel(disk) as kernel:
        kernel.server.add_node(DISK, 0, SIZE, writable=False)
        kernel.server.add_made_node(MADE)
        kernel.server.start(THREADS)
        sent = kernel.send(fuse.READ, MADE, fuse.read_body(0, 10))
        assert unmarked(kernel.forwarded()) == sent
        kernel.server.give_pieces(MADE, MADE_SIZE, metadata, PIECES)
        choice = random.Random(7)
        for _ in range(200):
            offset, length = choice.randrange(MADE_SIZE + 100), choice.randrange(12_000)
            assert kernel.ask(fuse.READ, MADE, fuse.read_body(offset, length)).body == content[offset:][:length]
        for whence, found in ((os.SEEK_DATA, 1500), (os.SEEK_HOLE, MADE_SIZE)):
            assert kernel.ask(fuse.LSEEK, MADE, fuse.lseek_body(1500, whence)).body == struct.pack("=Q", found)
        assert kernel.ask(fuse.LSEEK, MADE, fuse.lseek_body(MADE_SIZE, os.SEEK_DATA)).error == errno.ENXIO
        sent = kernel.send(fuse.OPEN, MADE, fuse.open_body(0))
        assert unmarked(kernel.forwarded()) == sent


def test_a_file_of_pieces_waits_for_the_maps_of_the_disk(disk: Disk, tmp_path: Path, made: tuple[int, bytes]) -> None:
    metadata, content = made
    mapped(disk, tmp_path, writable=False)
    with FakeKernel(disk) as kernel:
        kernel.server.add_made_node(MADE)
        kernel.server.start(1)
        kernel.server.give_pieces(MADE, MADE_SIZE, metadata, PIECES)
        sent = kernel.send(fuse.READ, MADE, fuse.read_body(0, MADE_SIZE))
        parked = parked_of(kernel, Queue.MOVES)
        assert parked.outcome().needs_map
        assert parked.outcome().offset // UNIT == 0  # of the disk, where the first piece lies
        install(disk, 0, Kind.DATA)
        assert not parked.resume()
        assert (parked.offset, parked.length) == (UNIT + 100, 2 * GRANULE)
        install(disk, UNIT, Kind.DATA)
        assert parked.resume()
        assert kernel.answer() == (sent, 0, content)


def test_pieces_lie_in_the_disk_and_in_their_order(disk: Disk, tmp_path: Path, made: tuple[int, bytes]) -> None:
    metadata, content = made
    disk.layer(host(tmp_path, "flat", pattern(SIZE, 3)), size=SIZE, identity=True)
    with FakeKernel(disk) as kernel:
        kernel.server.add_node(DISK, 0, SIZE, writable=False)
        kernel.server.add_made_node(MADE)
        kernel.server.start(1)
        most = (1 << 64) - 1
        for starts, offsets, lengths in (
            ([0, 10], [0, 0], [11, 5]),
            ([20, 10], [0, 0], [5, 5]),
            ([0], [SIZE], [1]),
            ([0], [1], [SIZE]),
            ([MADE_SIZE], [0], [1]),
            ([most], [0], [2]),
            ([2], [0], [most]),
            ([0], [most], [2]),
        ):
            with pytest.raises(ImageError):
                kernel.server.give_pieces(
                    MADE, MADE_SIZE, metadata, (array("Q", starts), array("Q", offsets), array("Q", lengths))
                )
        for inode in (DISK, 99):
            with pytest.raises(ImageError):
                kernel.server.give_pieces(inode, MADE_SIZE, metadata, PIECES)
        kernel.server.give_pieces(MADE, MADE_SIZE, metadata, PIECES)
        with pytest.raises(ImageError):
            kernel.server.give_pieces(MADE, MADE_SIZE, metadata, PIECES)  # once
        assert kernel.ask(fuse.READ, MADE, fuse.read_body(0, MADE_SIZE)).body == content


def test_a_seek_in_what_is_no_data_is_refused_and_never_unknown(disk: Disk, tmp_path: Path) -> None:
    """After one ENOSYS the kernel would seek in no file of the mount."""
    flat(disk, tmp_path, writable=False)
    with serving(disk, writable=False) as kernel:
        assert kernel.ask(fuse.LSEEK, 99, fuse.lseek_body(0, os.SEEK_DATA)).error == errno.EINVAL
