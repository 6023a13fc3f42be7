"""A front end's session: its messages, one after the other, are obeyed on the guest's disk.

Several front ends may be connected. One of them has the disk: only its messages lead there. Another one gets the disk
when the first is gone, or has stopped its rings while its writes are logged, at the end of a live migration.

A ring is served while it has memory, entries, addresses and a kick, and is enabled. Whatever message makes that true
or false starts or stops it. A message that cannot be obeyed is answered with an error where the front end waits for
an answer; else the conversation ends, because the front end would take it for obeyed.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl

from tapfs.kernel.vhost_device import ENTRIES_MAX, REGIONS_MAX, RINGS_MAX, Region, Ring, inflight_size
from tapfs.records import dataclass, field
from tapfs.vhost import messages
from tapfs.vhost.configuration import CONFIGURATION_BYTES, Feature, features_of, space_of
from tapfs.vhost.disk import GuestDisk
from tapfs.vhost.messages import Access, Addresses, Inflight, Kind, LogPlace, Payload, Protocol, Signal, State

_PROTOCOL = (
    Protocol.MQ
    | Protocol.LOG_SHMFD
    | Protocol.REPLY_ACK
    | Protocol.BACKEND_REQ
    | Protocol.CONFIG
    | Protocol.INFLIGHT_SHMFD
    | Protocol.RESET_DEVICE
    | Protocol.CONFIGURE_MEM_SLOTS
)

_EVENT = "anon_inode:[eventfd]"


class RefusedError(Exception):
    """A message cannot be obeyed."""


@dataclass(slots=True)
class _Ring:
    """What a front end has said of a ring."""

    entries: int = 0
    base: int = 0
    addresses: Addresses | None = None
    enabled: bool = False
    #: The eventfds: kick, call, error.
    descriptors: dict[Kind, int] = field(default_factory=dict[Kind, int])

    def descriptor(self, kind: Kind) -> int:
        return self.descriptors.get(kind, -1)

    def set_descriptor(self, kind: Kind, descriptor: int | None) -> None:
        old = self.descriptors.pop(kind, None)
        if descriptor is not None:
            self.descriptors[kind] = descriptor
        if old is not None:
            os.close(old)

    def close(self) -> None:
        for kind in list(self.descriptors):
            self.set_descriptor(kind, None)


class Conversation:
    """One front end's session from its first message to its end. Methods block, and are for one thread at a time."""

    def __init__(self, disk: GuestDisk) -> None:
        self._disk = disk
        self._features = Feature(0)
        self._protocol = Protocol(0)
        self._rings: dict[int, _Ring] = {}
        self._requests: socket.socket | None = None
        self._has_disk = False
        #: Another front end has the disk, for good.
        self.handed_over = False
        self._handlers: dict[Kind, Callable[..., bytes | None]] = {
            Kind.GET_FEATURES: lambda: messages.number(features_of(disk.image)),
            Kind.SET_FEATURES: self._set_features,
            Kind.SET_OWNER: lambda: None,
            Kind.RESET_OWNER: self._disable_all,
            Kind.SET_MEM_TABLE: self._set_memory,
            Kind.SET_LOG_BASE: self._set_log,
            Kind.SET_VRING_NUM: self._set_entries,
            Kind.SET_VRING_ADDR: self._set_addresses,
            Kind.SET_VRING_BASE: self._set_base,
            Kind.GET_VRING_BASE: self._stop,
            Kind.GET_PROTOCOL_FEATURES: lambda: messages.number(_PROTOCOL),
            Kind.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Kind.GET_QUEUE_NUM: lambda: messages.number(RINGS_MAX),
            Kind.SET_VRING_ENABLE: self._enable,
            Kind.SET_BACKEND_REQ_FD: self._set_request_socket,
            Kind.GET_CONFIG: self._get_configuration,
            Kind.SET_CONFIG: self._set_configuration,
            Kind.SET_INFLIGHT_FD: self._set_inflight,
            Kind.RESET_DEVICE: self._reset,
            Kind.GET_MAX_MEM_SLOTS: lambda: messages.number(REGIONS_MAX),
            Kind.ADD_MEM_REG: self._add_region,
            Kind.REM_MEM_REG: self._remove_region,
        }

    @staticmethod
    def needs_disk(kind: int) -> bool:
        """Whether a message leads to the disk: `answer` wants `take_disk` before it."""
        return kind not in _WITHOUT_DISK

    def take_disk(self) -> None:
        """Have the disk, which no other front end has."""
        self._has_disk = True

    @property
    def is_moving_away(self) -> bool:
        """Whether its guest has stopped to go on elsewhere: writes were logged, and no ring is served any more."""
        return Feature.LOG_ALL in self._features and not self._disk.connected

    def hand_over(self) -> None:
        """Let go of the disk for another front end, for good."""
        self._disk.forget_guest()
        self._has_disk = False
        self.handed_over = True

    def answer(self, kind: int, data: bytes, descriptors: list[int], *, need_reply: bool) -> tuple[bytes, list[int]]:
        """Obey a message; the reply, empty for none, and the descriptors that go with it.

        Takes over the descriptors of the message; those of the reply are the caller's. Raises MalformedError and
        RefusedError: then the conversation is over.
        """
        acknowledged = need_reply and Protocol.REPLY_ACK in self._protocol
        try:
            if self.handed_over and self.needs_disk(kind):
                acknowledged = False
                raise RefusedError("another front end has taken over its disk after a migration")
            if kind == Kind.GET_INFLIGHT_FD:
                return self._new_inflight(data)
            answer = self._obey(kind, data, descriptors)
        except RefusedError:
            if not acknowledged:
                raise
            return messages.reply(kind, messages.number(1)), []
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if answer is not None:
            return messages.reply(kind, answer), []
        return (messages.reply(kind, messages.number(0)) if acknowledged else b""), []

    def tell_of_change(self) -> None:
        """Tell the front end that the configuration space has changed, if it wants to hear that."""
        if self._requests is not None:
            with suppress(OSError):
                self._requests.send(messages.CONFIGURATION_CHANGED, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Answer what the guest has asked for, and let go of all that is its front end's."""
        with ExitStack() as closing:
            for ring in self._rings.values():
                closing.callback(ring.close)
            if self._requests is not None:
                closing.callback(self._requests.close)
            if self._has_disk:
                self._disk.forget_guest()

    # Messages

    def _obey(self, kind: int, data: bytes, descriptors: list[int]) -> bytes | None:
        try:
            known = Kind(kind)
        except ValueError:
            raise RefusedError(f"message {kind} is not known") from None
        payload = messages.read_payload(known, data)
        words: list[Payload | list[int]] = [] if payload is None else [payload]
        if known in _WITH_DESCRIPTORS:
            words.append(descriptors)
        try:
            if isinstance(payload, Signal):
                self._set_signal(known, payload, descriptors)
                return None
            return self._handlers[known](*words)
        except OSError as error:
            raise RefusedError(f"{known.name}: {os.strerror(error.errno or errno.EIO)}") from error

    def _set_features(self, number: int) -> None:
        unknown = number & ~features_of(self._disk.image)
        if unknown:
            raise RefusedError(f"features {unknown:#x} were not offered")
        features = Feature(number)
        changed = features != self._features
        self._features = features
        for index in self._rings if changed else ():
            self._restart(index)

    def _set_protocol_features(self, number: int) -> None:
        if number & ~_PROTOCOL:
            raise RefusedError(f"protocol features {number & ~_PROTOCOL:#x} were not offered")
        self._protocol = Protocol(number)

    def _set_memory(self, regions: tuple[Region, ...], descriptors: list[int]) -> None:
        if len(regions) != len(descriptors):
            raise RefusedError(f"{len(regions)} regions came with {len(descriptors)} descriptors")
        self._disk.add_regions(list(zip(regions, descriptors, strict=True)), instead=True)
        self._update_all()

    def _add_region(self, region: Region, descriptors: list[int]) -> None:
        if len(descriptors) != 1:
            raise RefusedError(f"a region came with {len(descriptors)} descriptors")
        self._disk.add_regions([(region, descriptors[0])], instead=False)
        self._update_all()

    def _remove_region(self, region: Region) -> None:
        self._disk.remove_region(region)

    def _new_inflight(self, data: bytes) -> tuple[bytes, list[int]]:
        asked = messages.read_payload(Kind.GET_INFLIGHT_FD, data)
        if not isinstance(asked, Inflight) or not 0 < asked.rings <= RINGS_MAX or not 0 < asked.entries <= ENTRIES_MAX:
            raise RefusedError("an in-flight region for no such rings")
        size = inflight_size(asked.rings, asked.entries)
        try:
            descriptor = os.memfd_create("tapfs-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
        except OSError as error:
            raise RefusedError(f"no in-flight region can be made: {os.strerror(error.errno or errno.EIO)}") from error
        made = asked._replace(size=size, offset=0)
        return messages.reply(Kind.GET_INFLIGHT_FD, messages.inflight(made, len(data))), [descriptor]

    def _set_inflight(self, region: Inflight, descriptors: list[int]) -> None:
        if len(descriptors) != 1:
            raise RefusedError(f"an in-flight region came with {len(descriptors)} descriptors")
        self._disk.track_in(descriptors[0], region.offset, region.size, region.rings, region.entries)

    def _set_log(self, place: LogPlace, descriptors: list[int]) -> bytes:
        if len(descriptors) != 1:
            raise RefusedError(f"a log came with {len(descriptors)} descriptors")
        self._disk.log_in(descriptors[0], place.offset, place.size)
        return b""

    def _get_configuration(self, access: Access) -> bytes:
        if access.offset + access.length > CONFIGURATION_BYTES:
            raise RefusedError("the configuration space is not so long")
        data = space_of(self._disk.image)[access.offset : access.offset + access.length]
        return messages.configuration(access, data)

    def _set_configuration(self, access: Access) -> None:
        raise RefusedError(f"nothing of the configuration space can be written, {access.length} bytes were")

    def _set_request_socket(self, descriptors: list[int]) -> None:
        if len(descriptors) != 1:
            raise RefusedError(f"a socket for our requests came with {len(descriptors)} descriptors")
        try:
            requests = socket.socket(fileno=descriptors[0])
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
            raise RefusedError(f"the socket for our requests is none: {why}") from error
        descriptors.clear()  # it is the socket's now
        if self._requests is not None:
            self._requests.close()
        self._requests = requests

    # Messages of rings

    def _ring(self, index: int) -> _Ring:
        if index >= RINGS_MAX:
            raise RefusedError(f"there is no ring {index}")
        return self._rings.setdefault(index, _Ring())

    def _set_entries(self, said: State) -> None:
        self._ring(said.ring).entries = said.number
        self._restart(said.ring)

    def _set_base(self, said: State) -> None:
        self._ring(said.ring).base = said.number & 0xFFFF
        self._restart(said.ring, keep_base=True)

    def _set_addresses(self, addresses: Addresses) -> None:
        self._ring(addresses.ring).addresses = addresses
        self._restart(addresses.ring)

    def _set_signal(self, kind: Kind, signal: Signal, descriptors: list[int]) -> None:
        ring = self._ring(signal.ring)
        descriptor: int | None = None
        if signal.present:
            if len(descriptors) != 1:
                raise RefusedError(f"{kind.name} came with {len(descriptors)} descriptors")
            if os.readlink(f"/proc/self/fd/{descriptors[0]}") != _EVENT:
                raise RefusedError(f"{kind.name} came with a descriptor that is no eventfd")
            descriptor = descriptors.pop()
            # A counter that is full must not stop the thread that adds to it.
            os.set_blocking(descriptor, False)
        elif kind is Kind.SET_VRING_KICK:
            raise RefusedError("a ring without an eventfd would have to be looked at without end")
        ring.set_descriptor(kind, descriptor)
        if not self._has_disk:
            return
        if kind is Kind.SET_VRING_CALL:
            self._disk.set_call(signal.ring, ring.descriptor(kind))
        else:
            self._restart(signal.ring)

    def _enable(self, said: State) -> None:
        self._ring(said.ring).enabled = said.number == 1
        self._update(said.ring)

    def _stop(self, said: State) -> bytes:
        ring = self._ring(said.ring)
        if self._disk.is_started(said.ring):
            ring.base = self._disk.stop_ring(said.ring, drains=Feature.LOG_ALL in self._features)
        # It starts again with the next one that comes.
        ring.set_descriptor(Kind.SET_VRING_KICK, None)
        return messages.state(said.ring, ring.base)

    def _disable_all(self) -> None:
        for index, ring in self._rings.items():
            ring.enabled = False
            self._update(index)

    def _reset(self) -> None:
        self._disable_all()
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()

    # Rings

    def _update_all(self) -> None:
        for index in self._rings:
            self._update(index)

    def _restart(self, index: int, *, keep_base: bool = False) -> None:
        """Something of a ring has changed: have it go on with that."""
        if self._disk.is_started(index):
            base = self._disk.stop_ring(index)
            if not keep_base:
                self._rings[index].base = base
        self._update(index)

    def _update(self, index: int) -> None:
        """Start or stop a ring, by what the front end has said."""
        ring = self._rings[index]
        enabled = ring.enabled or Feature.PROTOCOL_FEATURES not in self._features
        kick = ring.descriptor(Kind.SET_VRING_KICK)
        wanted = enabled and kick >= 0 and ring.entries > 0 and ring.addresses is not None
        if wanted == self._disk.is_started(index):
            return
        if not wanted or ring.addresses is None:
            ring.base = self._disk.stop_ring(index)
            return
        self._disk.start_ring(
            index,
            Ring(
                ring.addresses.descriptors,
                ring.addresses.available,
                ring.addresses.used,
                ring.entries,
                ring.base,
                kick,
                ring.descriptor(Kind.SET_VRING_CALL),
                ring.descriptor(Kind.SET_VRING_ERR),
                event_index=Feature.EVENT_IDX in self._features,
                indirect=Feature.INDIRECT_DESC in self._features,
                write_through=Feature.FLUSH not in self._features,
                logs=Feature.LOG_ALL in self._features,
                logs_ring=ring.addresses.logged,
                used_in_guest=ring.addresses.used_in_guest,
            ),
        )


#: Messages whose descriptors are asked for.
_WITH_DESCRIPTORS = {
    *(Kind.SET_MEM_TABLE, Kind.ADD_MEM_REG, Kind.SET_INFLIGHT_FD, Kind.SET_BACKEND_REQ_FD, Kind.SET_LOG_BASE),
}

#: Messages that a front end sends before its guest runs; the machine to which a guest migrates, before the guest comes.
_WITHOUT_DISK = {
    *(Kind.GET_FEATURES, Kind.SET_OWNER, Kind.GET_PROTOCOL_FEATURES, Kind.SET_PROTOCOL_FEATURES, Kind.GET_QUEUE_NUM),
    *(Kind.SET_BACKEND_REQ_FD, Kind.GET_CONFIG, Kind.SET_CONFIG, Kind.GET_INFLIGHT_FD, Kind.GET_MAX_MEM_SLOTS),
    *(Kind.SET_VRING_CALL, Kind.SET_VRING_ERR),
}
