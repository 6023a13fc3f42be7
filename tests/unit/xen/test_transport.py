"""Grants and event channels (kernel/src/xen/transport.h): the simulated machine, and the kernel's devices as a fake."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import select
import subprocess
from collections.abc import Iterator, Sequence
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.xen.blkif import PAGE
from tests.xen.machine import Domain, Machine

SOURCES = REPOSITORY / "kernel/src"
C_FILES = [SOURCES / f"xen/{name}.c" for name in ("transport", "simulated", "gntdev", "grants")]
FLAGS = ["-D_GNU_SOURCE", "-std=gnu11", "-g", "-O1", f"-I{SOURCES}"]
#: The suite also runs in a process with AddressSanitizer (make sanitize), where a library may use it, too.
SANITIZER = "-fsanitize=address,undefined" if "libasan" in os.environ.get("LD_PRELOAD", "") else "-fsanitize=undefined"
SHARED = ("-shared", "-fPIC", SANITIZER, "-fno-sanitize-recover=all")
FAKED = ("open", "close", "ioctl", "mmap", "munmap", "write")


class Mapping(Structure):
    _fields_ = (("memory", c_void_p), ("pages", c_uint32), ("handle", c_uint64))


class Copy(Structure):
    _fields_ = (
        ("local", c_void_p),
        ("reference", c_uint32),
        ("offset", c_uint16),
        ("length", c_uint16),
        ("error", c_int),
        ("may_vanish", c_bool),
    )


def build(output: Path, *extra: str | Path) -> Path:
    command = ["gcc", *FLAGS, *extra, "-o", output, *C_FILES, "-lpthread"]
    subprocess.run([str(word) for word in command], check=True)
    return output


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path), use_errno=True)
    references = POINTER(c_uint32)
    for name, result, arguments in (
        ("xen_transport_open", c_void_p, (c_char_p, c_uint32)),
        ("xen_transport_close", None, (c_void_p,)),
        ("xen_map", c_int, (c_void_p, references, c_uint32, c_bool, POINTER(Mapping))),
        ("xen_unmap", None, (c_void_p, POINTER(Mapping))),
        ("xen_copy", c_int, (c_void_p, POINTER(Copy), c_size_t, c_bool)),
        ("xen_bind", c_void_p, (c_void_p, c_uint32)),
        ("xen_unbind", None, (c_void_p,)),
        ("xen_channel_fd", c_int, (c_void_p,)),
        ("xen_channel_clear", None, (c_void_p,)),
        ("xen_notify", None, (c_void_p,)),
        ("xen_grants_new", c_void_p, (c_void_p, c_uint32)),
        ("xen_grants_free", None, (c_void_p,)),
        ("xen_grants_hold", c_int, (c_void_p, references, c_uint32, c_bool, POINTER(POINTER(c_uint8)))),
        ("xen_grants_release", None, (c_void_p, references, c_uint32, c_bool)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def words(values: Sequence[int]) -> ctypes.Array[c_uint32]:
    return (c_uint32 * len(values))(*values)


class Transport:
    """The C functions for one domain."""

    def __init__(self, library: ctypes.CDLL, machine: Path | None, domain: int) -> None:
        self.library = library
        self.handle = library.xen_transport_open(None if machine is None else os.fsencode(machine), domain)
        if not self.handle:
            raise OSError(ctypes.get_errno(), "xen_transport_open")

    def map(self, references: Sequence[int], *, writable: bool = True) -> Mapping:
        mapping = Mapping()
        error = self.library.xen_map(self.handle, words(references), len(references), writable, mapping)
        if error:
            raise OSError(error, "xen_map")
        return mapping

    def unmap(self, mapping: Mapping) -> None:
        self.library.xen_unmap(self.handle, mapping)
        assert mapping.memory is None

    def copy(self, pieces: Sequence[tuple[bytearray, int, int]], *, to_frontend: bool) -> tuple[int, list[int]]:
        """The result, and that of each piece: (our bytes, reference, offset)."""
        array = (Copy * len(pieces))()
        held = []
        for entry, (data, reference, offset) in zip(array, pieces, strict=True):
            local = (c_uint8 * len(data)).from_buffer(data)
            held.append(local)
            entry.local, entry.reference = ctypes.addressof(local), reference
            entry.offset, entry.length, entry.error = offset, len(data), 99
        result = self.library.xen_copy(self.handle, array, len(pieces), to_frontend)
        return result, [entry.error for entry in array]

    def bind(self, port: int) -> Channel:
        return Channel(self.library, self.handle, port)

    def close(self) -> None:
        self.library.xen_transport_close(self.handle)


class Channel:
    def __init__(self, library: ctypes.CDLL, transport: int, port: int) -> None:
        self.library = library
        self.handle = library.xen_bind(transport, port)
        if not self.handle:
            raise OSError(ctypes.get_errno(), "xen_bind")

    @property
    def signalled(self) -> bool:
        poll = select.poll()
        poll.register(self.library.xen_channel_fd(self.handle), select.POLLIN)
        return bool(poll.poll(0))

    def clear(self) -> None:
        self.library.xen_channel_clear(self.handle)

    def notify(self) -> None:
        self.library.xen_notify(self.handle)

    def close(self) -> None:
        self.library.xen_unbind(self.handle)


class Grants:
    def __init__(self, transport: Transport, limit: int) -> None:
        self.library = transport.library
        self.handle = self.library.xen_grants_new(transport.handle, limit)

    def hold(self, references: Sequence[int], *, writable: bool = True) -> list[int]:
        """The addresses of the pages."""
        memory = (POINTER(c_uint8) * len(references))()
        error = self.library.xen_grants_hold(self.handle, words(references), len(references), writable, memory)
        if error:
            raise OSError(error, "xen_grants_hold")
        return [ctypes.cast(place, c_void_p).value or 0 for place in memory]

    def release(self, references: Sequence[int], *, writable: bool = True) -> None:
        self.library.xen_grants_release(self.handle, words(references), len(references), writable)

    def close(self) -> None:
        self.library.xen_grants_free(self.handle)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("transport")
    return load(build(folder / "transport.so", *SHARED))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with Machine(tmp_path / "machine") as made:
        yield made


@pytest.fixture
def domain(machine: Machine) -> Domain:
    return machine.domain(3, pages=64, references=128)


@pytest.fixture
def transport(library: ctypes.CDLL, machine: Machine, domain: Domain) -> Iterator[Transport]:
    opened = Transport(library, machine.directory, 3)
    yield opened
    opened.close()


def mapped_pages(suffix: str = "domain-3.memory") -> int:
    """Pages of the domain in our memory, but for those of the whole file."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(suffix):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            total += (end - start) // PAGE
    return total


def descriptors() -> set[int]:
    """Those that this process has open; the one that lists them is gone again."""
    found = map(int, os.listdir("/proc/self/fd"))
    return {descriptor for descriptor in found if Path(f"/proc/self/fd/{descriptor}").exists()}


# ---- the simulated machine


def test_scattered_pages_stand_one_after_the_other(transport: Transport, domain: Domain) -> None:
    pages = domain.allocate(16)[::-1]
    references = [domain.grant(page) for page in pages]
    for number, page in enumerate(pages):
        domain.write_page(page, bytes([number]) * PAGE)
    before = mapped_pages()
    mapping = transport.map(references)
    assert mapping.pages == 16
    assert ctypes.string_at(mapping.memory, 16 * PAGE) == b"".join(bytes([n]) * PAGE for n in range(16))
    ctypes.memmove(mapping.memory + 3 * PAGE + 5, b"to the frontend", 15)
    assert domain.read_page(pages[3], 5, 15) == b"to the frontend"
    assert mapped_pages() == before + 16
    transport.unmap(mapping)
    assert mapped_pages() == before


def test_the_same_page_twice(transport: Transport, domain: Domain) -> None:
    reference = domain.grant(*domain.allocate())
    mapping = transport.map([reference, reference])
    ctypes.memmove(mapping.memory, b"x", 1)
    assert ctypes.string_at(mapping.memory + PAGE, 1) == b"x"
    transport.unmap(mapping)


def test_a_page_granted_for_reading(transport: Transport, domain: Domain) -> None:
    (page,) = domain.allocate()
    reference = domain.grant(page, readonly=True)
    with pytest.raises(OSError, match="xen_map") as caught:
        transport.map([reference])
    assert caught.value.errno == errno.EACCES
    before = mapped_pages()
    mapping = transport.map([reference], writable=False)
    assert "r--s" in next(
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{mapping.memory:x}-")
    )
    transport.unmap(mapping)
    assert mapped_pages() == before
    assert transport.copy([(bytearray(b"no"), reference, 0)], to_frontend=True) == (errno.EACCES, [errno.EACCES])
    assert transport.copy([(bytearray(2), reference, 0)], to_frontend=False) == (0, [0])
    assert domain.read_page(page, 0, 2) == b"\0\0"


def test_all_or_none(transport: Transport, domain: Domain) -> None:
    good = [domain.grant(page) for page in domain.allocate(5)]
    before = mapped_pages()
    for bad in (len(good), 127, 128, 1 << 31, (1 << 32) - 1):
        with pytest.raises(OSError, match="xen_map") as caught:
            transport.map([*good, bad])
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="xen_map"):
        transport.map([])
    assert mapped_pages() == before


def test_whatever_stands_in_the_grant_table(transport: Transport, domain: Domain) -> None:
    """Any entry, any reference, any place: the right bytes or the right errno."""
    generator = random.Random(4)
    for page in domain.allocate(64):
        domain.write_page(page, bytes([page + 1]) * PAGE)
    for _ in range(3000):
        entry = generator.choice(
            [
                generator.getrandbits(32),
                generator.randrange(64) << 2 | generator.getrandbits(2),
                generator.choice([63, 64, 65, (1 << 30) - 1]) << 2 | generator.getrandbits(2),
            ]
        )
        domain.set_grant(50, entry)
        reference = generator.choice([50, 50, 50, 50, generator.getrandbits(32) | 128])
        offset, length = generator.choice([0, 1, 4095, 4096, 65535]), generator.choice([1, 4095, 4096, 65535])
        writing = generator.random() < 0.5
        granted = 0 if reference == 50 and entry & 1 else errno.EINVAL
        if not granted and writing and entry & 2:
            granted = errno.EACCES
        if not granted and entry >> 2 >= 64:
            granted = errno.EFAULT
        expected = errno.EINVAL if offset + length > PAGE else granted
        data = bytearray([entry >> 2 & 63 | 1]) * length if writing else bytearray(length)
        if writing and not expected:
            data = bytearray([(entry >> 2) + 1]) * length
        assert transport.copy([(data, reference, offset)], to_frontend=writing) == (expected, [expected])
        assert writing or data == bytes([0 if expected else (entry >> 2) + 1]) * length
        if granted:
            with pytest.raises(OSError, match="xen_map") as caught:
                transport.map([reference], writable=writing)
            assert caught.value.errno == granted
        else:
            mapping = transport.map([reference], writable=writing)
            assert ctypes.string_at(mapping.memory, PAGE) == domain.read_page(entry >> 2)
            transport.unmap(mapping)


def test_a_copy_that_fails_leaves_the_others_alone(transport: Transport, domain: Domain) -> None:
    pages = domain.allocate(2)
    first, second = (domain.grant(page) for page in pages)
    pieces = [
        (bytearray(b"one"), first, 0),
        (bytearray(b"two"), 99, 0),
        (bytearray(b"three"), second, PAGE - 4),
        (bytearray(b"four"), second, PAGE - 4),
    ]
    assert transport.copy(pieces, to_frontend=True) == (errno.EINVAL, [0, errno.EINVAL, errno.EINVAL, 0])
    assert domain.read_page(pages[0], 0, 4) == b"one\0"
    assert domain.read_page(pages[1], PAGE - 5) == b"\0four"
    back = bytearray(4)
    assert transport.copy([(back, second, PAGE - 4)], to_frontend=False) == (0, [0])
    assert back == b"four"
    assert transport.copy([], to_frontend=False) == (0, [])


@pytest.mark.parametrize(
    ("memory", "grants", "pages", "references"),
    [(0, 64, 0, 16), (3 * PAGE + 100, 4 * 20 + 3, 3, 20), (PAGE - 1, 3, 0, 0), (PAGE, 4, 1, 1), (2 * PAGE, 0, 2, 0)],
)
def test_files_of_odd_sizes(
    library: ctypes.CDLL, tmp_path: Path, memory: int, grants: int, pages: int, references: int
) -> None:
    """What is not a whole page or entry does not count, and nobody reads behind the end of a file."""
    (tmp_path / "domain-1.memory").write_bytes(bytes(memory))
    entries = b"".join((number << 2 | 1).to_bytes(4, "little") for number in range(grants // 4 + 1))
    (tmp_path / "domain-1.grants").write_bytes(entries[:grants])
    transport = Transport(library, tmp_path, 1)
    for reference in range(32):
        expected = errno.EINVAL if reference >= references else errno.EFAULT if reference >= pages else 0
        result = transport.copy([(bytearray(PAGE), reference, 0)], to_frontend=True)
        assert result == (expected, [expected])
    transport.close()


def test_what_cannot_be_opened(library: ctypes.CDLL, tmp_path: Path) -> None:
    def refused(machine: Path, domain: int = 1) -> int:
        open_before = descriptors()
        with pytest.raises(OSError, match="open") as caught:
            Transport(library, machine, domain)
        assert descriptors() == open_before
        return caught.value.errno

    assert refused(tmp_path) == errno.ENOENT
    (tmp_path / "domain-1.memory").write_bytes(bytes(PAGE))
    assert refused(tmp_path) == errno.ENOENT
    os.mkfifo(tmp_path / "domain-1.grants")
    assert refused(tmp_path) == errno.EINVAL
    (tmp_path / "domain-1.memory").unlink()
    (tmp_path / "domain-1.memory").mkdir()
    assert refused(tmp_path) == errno.EISDIR
    assert refused(tmp_path / ("x" * 4090)) == errno.ENAMETOOLONG
    assert refused(tmp_path, 0x7FF0) == errno.EINVAL


def test_a_machine_without_xen(library: ctypes.CDLL) -> None:
    if not Path("/dev/xen/gntdev").exists():
        with pytest.raises(OSError, match="open") as caught:
            Transport(library, None, 3)
        assert caught.value.errno == errno.ENOENT


def test_an_event_channel(transport: Transport, domain: Domain) -> None:
    port = domain.port()
    channel = transport.bind(port.number)
    assert not channel.signalled
    assert not port.wait(0)
    port.notify()
    port.notify()
    assert channel.signalled
    channel.clear()
    assert not channel.signalled
    channel.clear()
    channel.notify()
    channel.notify()
    assert port.wait(0)
    assert not port.wait(0)
    for _ in range(100_000):  # more than a FIFO holds
        channel.notify()
    for _ in range(100_000):
        port.notify()
    while channel.signalled:
        channel.clear()
    assert port.wait(0)
    port.notify()
    assert channel.signalled
    channel.close()


def test_a_port_outlives_its_backend(transport: Transport, domain: Domain) -> None:
    port = domain.port()
    transport.bind(port.number).close()
    port.notify()
    channel = transport.bind(port.number)
    assert channel.signalled
    channel.close()


def test_ports_that_are_none(transport: Transport, machine: Machine) -> None:
    for number in (1, (1 << 32) - 1):
        with pytest.raises(OSError, match="bind") as caught:
            transport.bind(number)
        assert caught.value.errno == errno.ENOENT
    (machine.directory / "domain-3.port-1.to-backend").write_text("no FIFO")
    with pytest.raises(OSError, match="bind") as caught:
        transport.bind(1)
    assert caught.value.errno == errno.EINVAL
    (machine.directory / "domain-3.port-1.to-backend").unlink()
    os.mkfifo(machine.directory / "domain-3.port-1.to-backend")
    open_before = descriptors()
    with pytest.raises(OSError, match="bind"):
        transport.bind(1)
    assert descriptors() == open_before


def test_descriptors_are_closed_on_exec(library: ctypes.CDLL, machine: Machine, domain: Domain) -> None:
    port = domain.port()
    before = descriptors()
    transport = Transport(library, machine.directory, 3)
    channel = transport.bind(port.number)
    new = descriptors() - before
    assert len(new) == 3
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in new)
    channel.close()
    transport.close()
    assert descriptors() == before


# ---- persistent grants


def stamped(domain: Domain, count: int) -> list[int]:
    """References of so many pages, each of which begins with its own reference."""
    references = []
    for page in domain.allocate(count):
        references.append(domain.grant(page))
        domain.write_page(page, references[-1].to_bytes(4, "little"))
    return references


def stamps(places: Sequence[int]) -> list[int]:
    return [c_uint32.from_address(place).value for place in places]


def test_a_page_stays_mapped(transport: Transport, domain: Domain) -> None:
    references = stamped(domain, 20)
    whole = mapped_pages()
    grants = Grants(transport, 64)
    places = grants.hold(references)
    assert stamps(places) == references
    assert mapped_pages() == whole + 20
    grants.release(references)
    for reference in references:
        domain.set_grant(reference, 0)  # it needs no grant any more: it is mapped
    assert grants.hold(references[::-1]) == places[::-1]
    assert grants.hold(references[:1], writable=False) == places[:1]
    grants.release(references[:1], writable=False)
    grants.release(references)
    grants.close()
    assert mapped_pages() == whole


def test_one_reference_many_times(transport: Transport, domain: Domain) -> None:
    (reference,) = stamped(domain, 1)
    whole = mapped_pages()
    grants = Grants(transport, 0)
    assert len(set(grants.hold([reference] * 100))) == 1
    grants.release([reference] * 99)
    assert mapped_pages() == whole + 1
    grants.release([reference])
    assert mapped_pages() == whole
    grants.close()


def test_the_least_recently_used_go(transport: Transport, domain: Domain) -> None:
    references = stamped(domain, 4)
    whole = mapped_pages()
    grants = Grants(transport, 3)
    places = {}
    for reference in references[:3]:
        (places[reference],) = grants.hold([reference])
        grants.release([reference])
    grants.hold(references[:1])
    grants.release(references[:1])
    grants.hold(references[3:])  # in place of the second
    grants.release(references[3:])
    assert mapped_pages() == whole + 3
    for reference in references:
        domain.set_grant(reference, 0)
    for number in (0, 2, 3):
        assert stamps(grants.hold([references[number]])) == [references[number]]
    with pytest.raises(OSError, match="hold"):
        grants.hold([references[1]])
    for number in (0, 2, 3):
        grants.release([references[number]])
    grants.close()


def test_what_is_held_may_exceed_the_limit(transport: Transport, domain: Domain) -> None:
    references = stamped(domain, 60)
    whole = mapped_pages()
    grants = Grants(transport, 8)
    places = grants.hold(references)
    assert mapped_pages() == whole + 60
    again = grants.hold(references[:1])
    grants.release(references)
    assert again == places[:1]
    assert stamps(again) == references[:1]
    grants.release(references[:1])
    assert mapped_pages() <= whole + 8
    grants.close()


def test_a_failed_hold_holds_nothing(transport: Transport, domain: Domain) -> None:
    references = stamped(domain, 40)
    whole = mapped_pages()
    grants = Grants(transport, 0)
    for bad in (0, 5, 39, 40):
        with pytest.raises(OSError, match="hold") as caught:
            grants.hold([*references[:bad], 127, *references[bad:]])
        assert caught.value.errno == errno.EINVAL
        assert mapped_pages() == whole
    grants.close()


def test_first_for_reading_then_for_writing(transport: Transport, domain: Domain) -> None:
    (reference,) = stamped(domain, 1)
    whole = mapped_pages()
    grants = Grants(transport, 16)
    read_only = grants.hold([reference], writable=False)
    writable = grants.hold([reference])
    assert writable != read_only
    c_uint32.from_address(writable[0] + 4).value = 4711
    assert c_uint32.from_address(read_only[0] + 4).value == 4711
    grants.release([reference])
    grants.release([reference], writable=False)
    assert mapped_pages() == whole + 2
    assert grants.hold([reference], writable=False) == read_only
    grants.release([reference], writable=False)
    grants.close()
    assert mapped_pages() == whole


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads(tmp_path: Path, machine: Machine, sanitizer: str) -> None:
    program = build(
        tmp_path / "program", f"-fsanitize={sanitizer}", REPOSITORY / "tests/native" / "xen_grants_threads.c"
    )
    domain = machine.domain(1, pages=64, references=128)
    for number, page in enumerate(domain.allocate(64)):
        assert domain.grant(page) == 8 + number
        domain.write_page(page, number.to_bytes(4, "little"))
    environment = {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
    }  # it has its own sanitizer
    for limit in ("64", "20", "0"):
        command = [program, machine.directory, limit, "250"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# ---- the kernel's devices


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    wrapped = [f"-Wl,--wrap={name}" for name in FAKED]
    fake = REPOSITORY / "tests/native" / "xen_fake_kernel.c"
    library = load(build(tmp_path_factory.mktemp("faked") / "transport.so", *SHARED, *wrapped, fake))
    library.fake_memory.restype = c_void_p
    return library


class FakeKernel:
    """The frontend's side of it: domain 7 with 64 pages and as many references, port 5."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.memory: int = library.fake_memory()
        self.grants = (c_uint32 * 64).in_dll(library, "fake_grants")
        self.readonly = (c_bool * 64).in_dll(library, "fake_readonly")
        for number in range(64):
            self.grants[number] = 64 - number
            self.readonly[number] = False
            ctypes.memset(self.memory + number * PAGE, number, PAGE)

    def counter(self, name: str) -> c_int:
        return c_int.in_dll(self.library, f"fake_{name}")

    def page(self, reference: int) -> bytes:
        return ctypes.string_at(self.memory + (self.grants[reference] - 1) * PAGE, PAGE)


@pytest.fixture
def kernel(faked: ctypes.CDLL) -> FakeKernel:
    return FakeKernel(faked)


@pytest.fixture
def xen(faked: ctypes.CDLL, kernel: FakeKernel) -> Iterator[Transport]:
    opened = Transport(faked, None, 7)
    yield opened
    assert faked.fake_kept() == 0
    opened.close()


@pytest.mark.parametrize("count", [1, 16, 17, 300])
def test_gntdev_maps(xen: Transport, faked: ctypes.CDLL, count: int) -> None:
    references = [number * 5 % 64 for number in range(count)]
    mapping = xen.map(references)
    assert faked.fake_kept() == 1
    data = ctypes.string_at(mapping.memory, count * PAGE)
    assert [data[page * PAGE] for page in range(count)] == [63 - reference for reference in references]
    xen.unmap(mapping)


def test_gntdev_refuses(xen: Transport, kernel: FakeKernel, faked: ctypes.CDLL) -> None:
    """A map that fails is not kept in the kernel."""
    kernel.grants[9] = 0
    kernel.readonly[8] = True
    for references, writable in (([1, 9], True), ([64], False), ([8], True), ([], True), ([1] * 600, True)):
        with pytest.raises(OSError, match="map") as caught:
            xen.map(references, writable=writable)
        assert caught.value.errno == errno.EINVAL
        assert faked.fake_kept() == 0
    mapping = xen.map([8], writable=False)
    xen.unmap(mapping)
    kernel.counter("errno").value = errno.ENOSPC
    with pytest.raises(OSError, match="map") as caught:
        xen.map([1])
    kernel.counter("errno").value = 0
    assert caught.value.errno == errno.ENOSPC


def test_gntdev_copies(xen: Transport, kernel: FakeKernel) -> None:
    """In few calls, and every piece has its own result."""
    data = [bytearray(PAGE // 2) for _ in range(300)]
    pieces = [(piece, number % 64, number % 2 * 2048) for number, piece in enumerate(data)]
    calls = kernel.counter("copy_calls")
    calls.value = 0
    assert xen.copy(pieces, to_frontend=False) == (0, [0] * 300)
    assert calls.value == 3
    assert all(piece == bytes([63 - number % 64]) * 2048 for number, piece in enumerate(data))
    assert xen.copy([(bytearray(b"here"), 3, PAGE - 4)], to_frontend=True) == (0, [0])
    assert kernel.page(3)[-5:] == b"\x3chere"
    statuses = {
        -2: errno.ESRCH,
        -3: errno.EINVAL,
        -8: errno.EACCES,
        -9: errno.EFAULT,
        -10: errno.EINVAL,
        -12: errno.EAGAIN,
    }
    for status, error in {**statuses, -1: errno.EIO, 0: errno.EINVAL}.items():
        kernel.grants[5] = status
        mixed = [(bytearray(b"a"), 1, 0), (bytearray(b"b"), 5, 0), (bytearray(2), 6, PAGE - 1), (bytearray(b"c"), 2, 0)]
        assert xen.copy(mixed, to_frontend=True) == (error, [0, error, errno.EINVAL, 0])
        assert (kernel.page(1)[:1], kernel.page(2)[:1]) == (b"a", b"c")
    kernel.readonly[4] = True
    assert xen.copy([(bytearray(1), 4, 0)], to_frontend=True) == (errno.EACCES, [errno.EACCES])
    kernel.counter("errno").value = errno.ENOMEM
    assert xen.copy(pieces[:2], to_frontend=True) == (errno.ENOMEM, [errno.ENOMEM] * 2)
    kernel.counter("errno").value = 0


def test_gntdev_holds(xen: Transport, kernel: FakeKernel, faked: ctypes.CDLL) -> None:
    grants = Grants(xen, 40)
    references = list(range(40))
    grants.hold(references)
    assert faked.fake_kept() == 2  # few calls for many pages
    grants.release(references)
    grants.hold(references[:3])
    kernel.grants[50] = 0
    with pytest.raises(OSError, match="hold"):
        grants.hold([1, 49, 50])
    grants.release(references[:3])
    grants.close()


def test_evtchn(xen: Transport, kernel: FakeKernel, faked: ctypes.CDLL) -> None:
    for port in (4, 6):
        with pytest.raises(OSError, match="bind") as caught:
            xen.bind(port)
        assert caught.value.errno == errno.EINVAL
    channel = xen.bind(5)
    assert faked.fake_bound()
    channel.clear()  # nothing came: nothing to unmask
    for _ in range(2):
        faked.fake_event()
        faked.fake_event()  # while masked: it comes when the port is unmasked
        assert channel.signalled
        channel.clear()
        assert channel.signalled
        channel.clear()
        assert not channel.signalled
    sent = kernel.counter("notifications")
    sent.value = 0
    channel.notify()
    assert sent.value == 1
    channel.close()
    assert not faked.fake_bound()


def test_no_devices(faked: ctypes.CDLL, kernel: FakeKernel) -> None:
    kernel.counter("errno").value = errno.EACCES
    with pytest.raises(OSError, match="open") as caught:
        Transport(faked, None, 7)
    kernel.counter("errno").value = 0
    assert caught.value.errno == errno.EACCES
