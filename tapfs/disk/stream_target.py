"""Fill a new image as a stream: payloads are appended in order, and metadata follows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tapfs.driver import BatchStreamWriter, Codec, Driver, FramedStreamWriter, Streamable, StreamWriter
from tapfs.errors import ErrorKind, ImageError
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.disk.engine_chain import EngineChain
    from tapfs.kernel.engine import Buffer
    from tapfs.kernel.window_packer import PackedUnits

#: Metadata is written when it has grown to this many bytes, so memory stays bounded.
_UNFLUSHED_LIMIT = 8 << 20

#: Small payloads are gathered into host writes of about this many bytes.
_GATHER_BYTES = 1 << 20


class StreamHost(Protocol):
    """What takes the bytes and the plans of a stream: an engine's disk is one."""

    def write_host(self, file: int, host_offset: int, buffer: Buffer, *, guest_offset: int | None = None) -> None:
        """Write bytes at a place of a host file; those of a `guest_offset` are encrypted, if the image is."""
        ...

    def execute(self, plan: Plan) -> None:
        """Execute a plan."""
        ...


class StreamTarget:
    """A new image that is written once, granule by granule, ascending. Not thread-safe.

    Nothing of it is an image before `finish` has returned. `forwards`: what a table takes is written before the
    granules behind it, so that the file of a :class:`tapfs.driver.ForwardStreamWriter` is written from its start to
    its end.
    """

    def __init__(
        self, engine: StreamHost, writer: StreamWriter, *, granule: int, codec: Codec, forwards: bool = False
    ) -> None:
        self.granule = granule
        self.codec = codec
        self._engine = engine
        self._writer = writer
        self._forwards = forwards
        # Asked for once: looking whether an object has a protocol costs more than packing a granule.
        self._framed = writer if isinstance(writer, FramedStreamWriter) else None
        whole = self._framed is None and not forwards
        self._batched = writer if whole and isinstance(writer, BatchStreamWriter) else None
        self._gathered = bytearray()
        self._gathered_at = 0

    def write_compressed(self, offset: int, payload: bytes) -> None:
        """The packed granule at guest `offset`."""
        if self._framed is not None:
            payload = self._framed.frame(offset, payload)
        self._gather(self._append(offset, len(payload), compressed=True), payload)

    def write_plain(self, offset: int, data: Buffer) -> None:
        """The granule at guest `offset`, which does not shrink, as it is; a short last one is filled with zeros.

        Where every granule must be packed it is packed, and longer for it.
        """
        if self._framed is not None:
            self.write_compressed(offset, _packed(self.codec, bytes(data).ljust(self.granule, b"\0")))
            return
        host_offset = self._append(offset, self.granule, compressed=False)
        self._put()
        padded = data if len(data) == self.granule else bytes(data).ljust(self.granule, b"\0")
        self._engine.write_host(0, host_offset, padded, guest_offset=offset)

    def write_units(self, units: PackedUnits) -> None:
        """The granules of a window, in order; the driver is asked once for all of them, where it can."""
        if self._batched is None:
            for offset, payload, memory in units.each():
                if payload is None:
                    self.write_plain(offset, memory)
                else:
                    self.write_compressed(offset, payload)
            return
        self._put()
        self._bound()
        places = self._batched.append_all(units.offsets, units.lengths)
        for run in units.runs(places):
            self._engine.write_host(0, run.host_offset, run.data, guest_offset=run.offset)

    def finish(self) -> None:
        """Write the metadata; the image is complete and durable."""
        self._put()
        self._execute(self._writer.finish())

    def _gather(self, host_offset: int, payload: bytes) -> None:
        follows = host_offset == self._gathered_at + len(self._gathered)
        if not follows or len(self._gathered) >= _GATHER_BYTES:
            self._put()
        if not self._gathered:
            self._gathered_at = host_offset
        self._gathered += payload

    def _put(self) -> None:
        if self._gathered:
            self._engine.write_host(0, self._gathered_at, self._gathered)
            self._gathered = bytearray()

    def _append(self, offset: int, host_length: int, *, compressed: bool) -> int:
        self._bound()
        place = self._writer.append(offset, host_length, compressed=compressed)
        if self._forwards and self._writer.unflushed_bytes:
            self._put()
            self._execute(self._writer.drain())
        return place

    def _bound(self) -> None:
        """Write the metadata if much of it waits."""
        if self._writer.unflushed_bytes > _UNFLUSHED_LIMIT:
            self._put()
            self._execute(self._writer.drain())

    def _execute(self, plan: Plan) -> None:
        self._engine.execute(plan)
        self._writer.drained(plan)


def _packed(codec: Codec, granule: bytes) -> bytes:
    """A granule in the form of a codec, as it is but for what the form adds."""
    if codec is Codec.ZLIB:
        import zlib  # no other format is made of such units

        return zlib.compress(granule, 0)
    raise ImageError(ErrorKind.UNSUPPORTED, f"{codec.name} has no form for what does not shrink", op="compress")


def stream_into(chain: EngineChain) -> StreamTarget:
    """The stream that fills the new, empty image on top of a chain. Raises ImageError(unsupported)."""
    target = stream_of(chain.engine, chain.top.driver, chain.top.path)
    # The stream changes the map behind the engine's back.
    chain.engine.forget(0, 0, chain.size)
    return target


class LockedStream:
    """A stream writer whose driver others ask for maps meanwhile, under a lock."""

    def __init__(self, writer: StreamWriter, lock: threading.Lock) -> None:
        self._writer = writer
        self._lock = lock

    def append(self, offset: int, host_length: int, *, compressed: bool) -> int:
        """See :class:`tapfs.driver.StreamWriter`."""
        with self._lock:
            return self._writer.append(offset, host_length, compressed=compressed)

    @property
    def unflushed_bytes(self) -> int:
        """See :class:`tapfs.driver.StreamWriter`."""
        return self._writer.unflushed_bytes

    def drain(self) -> Plan:
        """See :class:`tapfs.driver.StreamWriter`."""
        with self._lock:
            return self._writer.drain()

    def finish(self) -> Plan:
        """See :class:`tapfs.driver.StreamWriter`."""
        with self._lock:
            return self._writer.finish()

    def drained(self, executed: Plan) -> None:
        """See :class:`tapfs.driver.StreamWriter`."""
        with self._lock:
            self._writer.drained(executed)


def stream_of(
    host: StreamHost,
    driver: Driver,
    path: str,
    wrap: Callable[[StreamWriter], StreamWriter] | None = None,
    *,
    forwards: bool = False,
) -> StreamTarget:
    """The stream that fills an image by way of `host`; `wrap` may give its writer a lock.

    `forwards` as for :class:`StreamTarget`. Raises ImageError(unsupported).
    """
    if not isinstance(driver, Streamable):
        message = f"a {driver.format_name} image is not written compressed"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path)
    packing = driver.geometry.packing
    codec = Codec.NONE if packing is None else packing.codec
    writer = driver.stream()
    return StreamTarget(
        host,
        writer if wrap is None else wrap(writer),
        granule=driver.geometry.packed_unit,
        codec=codec,
        forwards=forwards,
    )
