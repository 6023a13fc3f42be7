"""Keys of a guest about its rings: right, senseless, or meant to harm."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapfs import ErrorKind, ImageError
from tapfs.kernel.xen_ring import Protocol
from tapfs.xen.disk.frontend_keys import FrontendKeys, RingKeys, read_frontend

FRONTEND = "/local/domain/1/device/vbd/51712"
ONE = {"ring-ref": "8", "event-channel": "5"}


class Keys:
    """A store of one directory."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys = {f"{FRONTEND}/{name}": value for name, value in keys.items()}

    async def read(self, path: str) -> str | None:
        return self.keys.get(path)


async def parse(keys: dict[str, str], page_order: int = 4, queues: int = 4) -> FrontendKeys:
    return await read_frontend(Keys(keys), FRONTEND, page_order=page_order, queues=queues)  # type: ignore[arg-type]


async def test_one_ring_of_one_page() -> None:
    assert await parse(ONE) == FrontendKeys(Protocol.NATIVE, False, (RingKeys((8,), 5),))


async def test_a_page_order_of_nothing_names_its_page_either_way() -> None:
    assert (await parse(ONE | {"ring-page-order": "0"})).rings == (RingKeys((8,), 5),)
    assert (await parse({"ring-page-order": "0", "ring-ref0": "9", "event-channel": "5"})).rings == (RingKeys((9,), 5),)


async def test_several_pages_queues_and_abis() -> None:
    keys = {"protocol": "x86_32-abi", "feature-persistent": "1", "multi-queue-num-queues": "2", "ring-page-order": "1"}
    for queue in range(2):
        keys |= {f"queue-{queue}/ring-ref{page}": str(10 * queue + page) for page in range(2)}
        keys[f"queue-{queue}/event-channel"] = str(queue)
    assert await parse(keys) == FrontendKeys(Protocol.X86_32, True, (RingKeys((0, 1), 0), RingKeys((10, 11), 1)))


@pytest.mark.parametrize(
    "change",
    [
        {"ring-ref": None},
        {"event-channel": None},
        {"ring-ref": "-1"},
        {"ring-ref": "4294967296"},
        {"ring-ref": "1" * 5000},
        {"ring-ref": "٣"},
        {"ring-ref": "0x8"},
        {"ring-ref": ""},
        {"event-channel": " 5"},
        {"ring-page-order": "5"},
        {"ring-page-order": "63"},
        {"ring-page-order": "1"},
        {"multi-queue-num-queues": "0"},
        {"multi-queue-num-queues": "5"},
        {"multi-queue-num-queues": "2"},
        {"protocol": "arm-abi"},
        {"protocol": ""},
        {"protocol": "x86_64-abi\n\x1b[31mred"},
        {
            "multi-queue-num-queues": "2",
            **{f"queue-{queue}/{name}": "7" for queue in range(2) for name in ("ring-ref", "event-channel")},
        },
    ],
)
async def test_what_makes_no_sense_is_one_line_that_names_the_key(change: dict[str, str | None]) -> None:
    keys = {name: value for name, value in (ONE | change).items() if value is not None}
    with pytest.raises(ImageError) as raised:
        await parse(keys)
    assert raised.value.kind in (ErrorKind.INVALID_FORMAT, ErrorKind.UNSUPPORTED)
    assert str(raised.value).startswith(FRONTEND)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200


async def test_less_is_taken_where_less_was_offered() -> None:
    for keys in (ONE | {"ring-page-order": "1"}, ONE | {"multi-queue-num-queues": "2"}):
        with pytest.raises(ImageError):
            await parse(keys, page_order=0, queues=1)


NAMES = ["ring-page-order", "multi-queue-num-queues", "protocol", "feature-persistent", "ring-ref", "event-channel"]
NAMES += [f"ring-ref{page}" for page in range(3)] + [f"queue-{queue}/ring-ref" for queue in range(3)]
NAMES += [f"queue-{queue}/event-channel" for queue in range(3)]


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.one_of(
            st.text("0123456789-+_x ٣²é\n\x1b\udc80", max_size=12),
            st.integers(-2, 1 << 34).map(str),
            st.sampled_from("012345"),
            st.sampled_from(["x86_32-abi", "x86_64-abi"]),
        ),
    )
)
@settings(deadline=None)
async def test_any_keys_are_rings_within_the_bounds_or_an_error(keys: dict[str, str]) -> None:
    found, said = None, ""
    try:
        found = await parse(keys, page_order=2, queues=3)
    except ImageError as error:
        said = str(error)
    assert said.isprintable()
    if found is None:
        return
    assert 1 <= len(found.rings) <= 3
    assert len({ring.port for ring in found.rings}) == len(found.rings)
    for ring in found.rings:
        assert len(ring.references) in (1, 2, 4)
        assert all(0 <= word < 1 << 32 for word in (*ring.references, ring.port))


async def test_a_guest_on_arm_speaks_what_its_host_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    assert (await parse(ONE | {"protocol": "arm-abi"})).protocol is Protocol.NATIVE
