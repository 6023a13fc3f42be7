"""A guest's side of the xenbus handshake of a block device: keys and states in xenstore (Xen's io/blkif.h).

The toolstack has made both directories before; the rings are those of tests/xen/frontend.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import Device, State, parse_state
from tapfs.xen.xenstore.client import Store, XenStore
from tests.xen.blkif import Abi
from tests.xen.frontend import Frontend
from tests.xen.machine import PATIENCE, Domain


class XenbusFrontend:
    """The driver of one device in a guest.

    `ring_pages` and `queues` are what it would like; it takes what the backend offers. `wrong` are keys of its
    directory that it writes differently than it should (None: not at all).
    """

    def __init__(
        self,
        store: XenStore,
        domain: Domain,
        device: Device,
        *,
        abi: Abi = Abi.NATIVE,
        ring_pages: int = 1,
        queues: int = 1,
        indirect_segments: int = 0,
        persistent: bool = False,
        wrong: Mapping[str, str | int | None] | None = None,
    ) -> None:
        self.store, self.domain, self.device = store, domain, device
        self.abi, self.ring_pages, self.queues = abi, ring_pages, queues
        self.indirect_segments, self.persistent = indirect_segments, persistent
        self.wrong = dict(wrong or {})
        self._frontend: Frontend | None = None
        #: What the backend said when it was connected.
        self.sectors = self.sector_size = self.info = 0

    @property
    def frontend(self) -> Frontend:
        """The rings, while there are any."""
        assert self._frontend is not None, "not connected"
        return self._frontend

    # ---- keys

    async def offered(self, key: str) -> int:
        """A number that the backend wrote; 0 if it did not."""
        return int(await self.store.read(f"{self.device.backend}/{key}") or 0)

    async def set_state(self, state: State) -> None:
        await self.store.write(f"{self.device.frontend}/state", int(state))

    async def backend_state(self) -> State:
        """UNKNOWN when it is gone."""
        try:
            return parse_state(await self.store.read(f"{self.device.backend}/state"))
        except ImageError as error:
            # What is not there is as forbidden to a guest as the directory above.
            if error.kind is not ErrorKind.DENIED:
                raise
            return State.UNKNOWN

    async def await_backend(self, *states: State) -> State:
        """Wait until the backend is in one of these; State.UNKNOWN: until its directory is gone."""
        with trio.fail_after(PATIENCE):
            async with self.store.watch(f"{self.device.backend}/state") as events:
                async for _ in events:
                    state = await self.backend_state()
                    if state in states:
                        return state
        raise AssertionError("a watch has ended")

    async def _read_disk(self) -> None:
        self.sectors, self.sector_size = await self.offered("sectors"), await self.offered("sector-size")
        self.info = await self.offered("info")

    async def await_sectors(self, sectors: int) -> None:
        """Wait until the disk has so many sectors of 512 bytes: it was resized. As Linux, watch the state alone."""
        with trio.fail_after(PATIENCE):
            async with self.store.watch(f"{self.device.backend}/state") as events:
                async for _ in events:
                    await self._read_disk()
                    if self.sectors == sectors:
                        return

    # ---- life

    def _keys(self, frontend: Frontend) -> dict[str, str | int | None]:
        keys: dict[str, str | int | None] = {"protocol": self.abi.key}
        if self.persistent:
            keys["feature-persistent"] = 1
        several = len(frontend.rings) > 1
        if several:
            keys["multi-queue-num-queues"] = len(frontend.rings)
        order = len(frontend.ring.pages).bit_length() - 1
        if order:
            keys["ring-page-order"] = order
        for number, ring in enumerate(frontend.rings):
            prefix = f"queue-{number}/" if several else ""
            for page, reference in enumerate(ring.references):
                keys[f"{prefix}ring-ref{page if order else ''}"] = reference
            keys[f"{prefix}event-channel"] = ring.port.number
        return keys

    async def publish(self) -> Frontend:
        """Wait for the backend, make the rings and write their keys, state 3: the first half of `connect`."""
        await self.await_backend(State.INIT_WAIT)
        self._frontend = Frontend(
            self.domain,
            abi=self.abi,
            ring_pages=min(self.ring_pages, 1 << await self.offered("max-ring-page-order")),
            queues=min(self.queues, await self.offered("multi-queue-max-queues") or 1),
            indirect_segments=min(self.indirect_segments, await self.offered("feature-max-indirect-segments")),
            persistent=self.persistent and bool(await self.offered("feature-persistent")),
        )
        keys = self._keys(self._frontend) | self.wrong

        async def write(store: Store) -> None:
            for name, value in keys.items():
                if value is None:
                    await store.remove(f"{self.device.frontend}/{name}")
                else:
                    await store.write(f"{self.device.frontend}/{name}", value)

        await self.store.transact(write)
        await self.set_state(State.INITIALISED)
        return self._frontend

    async def connect(self) -> Frontend:
        """The whole handshake, to state 4 on both sides."""
        frontend = await self.publish()
        state = await self.await_backend(State.CONNECTED, State.CLOSING, State.CLOSED)
        assert state == State.CONNECTED, f"the backend went to {state!r}"
        await self._read_disk()
        assert self.sector_size in {512, 4096}, f"sector-size is {self.sector_size}"
        await self.set_state(State.CONNECTED)
        return frontend

    def _forget_rings(self) -> None:
        if self._frontend is not None:
            self._frontend.close()
            self._frontend = None

    async def close(self) -> None:
        """Give the device up, as a driver that is unloaded or told to: 5, 6, and wait for the backend."""
        await self.set_state(State.CLOSING)
        await self.await_backend(State.CLOSING, State.CLOSED, State.INIT_WAIT, State.UNKNOWN)
        await self.set_state(State.CLOSED)
        await self.await_backend(State.CLOSED, State.INIT_WAIT, State.UNKNOWN)
        self._forget_rings()

    async def close_when_told(self) -> None:
        """Wait for a detach and close: what a guest does about an unplugged disk."""
        await self.await_backend(State.CLOSING, State.CLOSED, State.UNKNOWN)
        if await self.backend_state() != State.UNKNOWN:
            await self.close()
        else:
            self._forget_rings()

    async def reboot(self, *, abrupt: bool = False) -> Frontend:
        """Connect anew as the next kernel does; `abrupt`: without a word from the one before (a crash and kexec)."""
        if not abrupt:
            await self.close()
        await self.set_state(State.INITIALISING)
        await self.await_backend(State.INIT_WAIT)
        self._forget_rings()
        return await self.connect()
