"""Every way into the engine while its memory ends: allocation number N fails, and no other, for each N of that way.

The operations of tests/faults/operations.py are one way in. Here are the others: checks, maps, copies, packing,
ciphers, chains, and the servers of NBD, vhost-user, Xen rings and FUSE. What is asked for gives what it gives else,
or an ImageError or MemoryError that says so; a server goes on, and serves the next one who asks.
"""

from __future__ import annotations

import errno
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import tapfs
from tapfs.errors import ImageError
from tests import nbd_client as nbd
from tests import vhost_front_end as virtio
from tests.faults.interposer import Interposer
from tests.unit.fuse import fuse_device as fuse
from tests.unit.nbd.served import Served as NbdServed
from tests.unit.vhost.served import Served as VhostServed
from tests.unit.xen.xen_rings import DOMAIN, new_machine
from tests.unit.xen.xen_rings import Served as XenServed
from tests.vhost_front_end import Ring
from tests.xen.frontend import Frontend, RequestError

#: A block under which the chosen allocation fails, if it comes there.
Armed = Callable[[], AbstractContextManager[None]]
#: What is done in a folder; the result is what it gives without faults, too.
Entry = Callable[[Path, Armed], object]

_SIZE = 1 << 20
_PASSWORD = b"secret"
_DATA = b"\x55" * 9000


def content() -> bytes:
    """The disk of every image: data that packs, zeros, data that does not."""
    return b"some words " * 30000 + bytes(_SIZE // 2 - 330000) + random.Random(15).randbytes(_SIZE // 2)


def _image(folder: Path, format_name: str = "qcow2", *, compressed: bool = False, **options: str) -> Path:
    path = folder / f"image.{format_name}"
    source = folder / "source"
    source.write_bytes(content())
    tapfs.convert(source, path, format="raw", target_format=format_name, compressed=compressed, options=options or None)
    return path


def _plain(work: Callable[[Path], object], prepare: Callable[[Path], object]) -> Entry:
    """An entry all of whose work is done under the fault."""

    def entry(folder: Path, armed: Armed) -> object:
        prepare(folder)
        with armed():
            return work(folder)

    return entry


def _check(folder: Path) -> object:
    return tapfs.check(folder / "image.qcow2", format="qcow2").corruptions


def _map(folder: Path) -> object:
    with tapfs.open(folder / "image.qcow2", format="qcow2") as disk:
        return [(each.offset, each.length, each.zero) for each in disk.extents()]


def _copied(format_name: str, *, compressed: bool, source: str) -> Entry:
    def entry(folder: Path, armed: Armed) -> object:
        path = _image(folder, source) if source != "packed" else _image(folder, compressed=True)
        target = folder / "target"
        try:
            with armed():
                tapfs.convert(path, target, format=path.suffix[1:], target_format=format_name, compressed=compressed)
        except (ImageError, MemoryError):
            assert not target.exists(), "what failed has left its target"
            raise
        with tapfs.open(target, format=format_name) as disk:
            return disk.read(0, disk.size)

    return entry


def _prepare_chain(folder: Path) -> None:
    below = str(_image(folder))
    for name in ("one", "two", "three"):
        tapfs.create(folder / name, "qcow2", _SIZE, backing=below, backing_format="qcow2")
        with tapfs.open(folder / name, format="qcow2", writable=True) as disk:
            disk.write(len(name) * 70000, _DATA)
        below = str(folder / name)


def _chain(folder: Path) -> object:
    with tapfs.open(folder / "three", format="qcow2") as disk:
        return [disk.read(0, disk.size) for _ in range(3)]


def _prepare_luks(folder: Path) -> None:
    tapfs.create(folder / "luks", "luks", _SIZE, password=_PASSWORD, options={"iter-time": "1"})


def _luks(folder: Path) -> object:
    with tapfs.open(folder / "luks", format="luks", writable=True, password=_PASSWORD) as disk:
        disk.write(512, _DATA)
        return disk.read(512, len(_DATA))  # the key is another one in each image, and so are sectors not written


def _hash(folder: Path) -> object:
    return tapfs.write_sidecar(folder / "image.qcow2", folder / "sidecar", format="qcow2").root


def _compare(folder: Path) -> object:
    return tapfs.compare(folder / "image.qcow2", folder / "source", left_format="qcow2", right_format="raw")


def _nbd(folder: Path, armed: Armed) -> object:
    image = tapfs.open(_image(folder), format="qcow2", writable=True)
    server = NbdServed(image)
    with server:
        for style in (nbd.SIMPLE, nbd.STRUCTURED, nbd.EXTENDED):
            with armed():
                try:
                    client = server.connect(style)
                    said = [client.ask(nbd.WRITE, 700, data=_DATA).error, client.ask(nbd.READ, 0, 200000).error]
                    said.append(client.ask(nbd.FLUSH).error)
                    assert set(said) <= {0, errno.ENOMEM, errno.EIO}, f"errors {said}"
                except TimeoutError as error:
                    raise AssertionError("a client has no answer") from error
                except (EOFError, OSError):
                    pass  # a client for whom there is no memory is let go
        client = server.connect(nbd.STRUCTURED)
        assert client.ask(nbd.WRITE, 700, data=_DATA).error == 0
        return client.ask(nbd.READ, 0, 20000).whole()


class _RefusedError(Exception):
    """The back end has no memory for a queue, and says so."""


def _ring(served: VhostServed) -> Ring:
    """A ring of a new front end."""
    front_end = served.connect()
    front_end.negotiate()
    ring = Ring(front_end)
    try:
        ring.set_up()
    except AssertionError as error:  # each of its messages has to be answered by 0
        raise _RefusedError from error
    return ring


def _vhost(folder: Path, armed: Armed) -> object:
    image = tapfs.open(_image(folder), format="qcow2", writable=True)
    with VhostServed(image) as served:
        with armed():
            try:
                ring = _ring(served)
                for piece in range(4):
                    ring.do(virtio.OUT, 3, data=_DATA[:4096], pieces=1 + piece, indirect=bool(piece % 2))
                    ring.do(virtio.IN, 0, length=65536, pieces=1 + piece, indirect=bool(piece % 2))
                ring.do(virtio.FLUSH)
            except (EOFError, OSError, _RefusedError):
                pass
        for each in served._front_ends:  # pyright: ignore[reportPrivateUsage]
            each.close()
        served.wait_until_gone()
        ring = _ring(served)
        ring.write(3, _DATA[:4096])
        return ring.read(0, 16384)


def _xen(folder: Path, armed: Armed) -> object:
    path = _image(folder)
    with new_machine() as machine, tapfs.open(path, format="qcow2", writable=True) as image:
        domain = machine.domain(DOMAIN)
        with Frontend(domain) as frontend, armed(), XenServed(machine, frontend, image):
            try:
                frontend.write(3, _DATA[:4096])
                frontend.read(0, 88)
                frontend.flush()
            except RequestError:
                pass
        with Frontend(domain) as frontend, XenServed(machine, frontend, image):
            frontend.write(3, _DATA[:4096])
            return frontend.read(0, 32)


def _fuse(folder: Path, armed: Armed) -> object:
    path = _image(folder, "raw")
    with tapfs.open(path, format="raw", writable=True) as image:
        image.read(0, 512)
        engine = image.engine_disk
        with armed(), fuse.FakeKernel(engine) as kernel:
            kernel.server.add_node(2, 0, _SIZE, writable=True)
            kernel.server.start(2)
            for at in range(4):
                answer = kernel.ask(fuse.WRITE, 2, fuse.write_body(700 + at, _DATA))
                assert answer.error in {0, errno.ENOMEM, errno.EIO}
                assert kernel.ask(fuse.READ, 2, fuse.read_body(0, 65536)).error in {0, errno.ENOMEM, errno.EIO}
        with fuse.FakeKernel(engine) as kernel:
            kernel.server.add_node(2, 0, _SIZE, writable=True)
            kernel.server.start(2)
            assert kernel.ask(fuse.WRITE, 2, fuse.write_body(700, _DATA + _DATA)).error == 0
            return kernel.ask(fuse.READ, 2, fuse.read_body(0, 16384)).body


ENTRIES: dict[str, Entry] = {
    "check": _plain(_check, _image),
    "map": _plain(_map, _image),
    "chain": _plain(_chain, _prepare_chain),
    "luks": _plain(_luks, _prepare_luks),
    "hash": _plain(_hash, _image),
    "compare": _plain(_compare, _image),
    "copy-to-raw": _copied("raw", compressed=False, source="qcow2"),
    "copy-from-raw": _copied("raw", compressed=False, source="raw"),
    "copy-to-vmdk": _copied("vmdk", compressed=False, source="qcow2"),
    "pack": _copied("qcow2", compressed=True, source="raw"),
    "unpack": _copied("raw", compressed=False, source="packed"),
    "nbd": _nbd,
    "vhost": _vhost,
    "xen": _xen,
    "fuse": _fuse,
}


def run(interposer: Interposer, name: str, folder: Path) -> tuple[str, Counter[str]]:
    """Fail every allocation of an entry, one at a time. Raises AssertionError; the result says how many there were."""
    failed, count = 0, 0
    expected: object = None
    for number in itertools.count(-1):  # the first run meets no fault
        each = folder / str(number)
        each.mkdir()
        interposer.aim("memory", number if number >= 0 else 1 << 40)
        try:
            found = ENTRIES[name](each, interposer.armed)
        except (ImageError, MemoryError) as error:
            if number < 0 or not (isinstance(error, MemoryError) or "memory" in str(error)):
                message = f"allocation {number} of {name} fails, and {error!r} does not say so"
                raise AssertionError(message) from error
            failed += 1
        except BaseException as error:
            error.add_note(f"where allocation {number} of {name} fails")
            raise
        else:
            if number < 0:
                expected = found
            assert found == expected, f"where allocation {number} of {name} fails it gives something else"
        shutil.rmtree(each)
        if number >= 0:
            if not interposer.met:
                return f"{count} allocations, {failed} ended it", Counter({"memory": count})
            count += 1
    raise AssertionError("the numbers do not end")
