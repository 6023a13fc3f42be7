"""Power fails while a password is added or removed: the one that stays opens the image at every moment."""

from __future__ import annotations

import random

import pytest

from tapfs.disk.probe import format_named
from tapfs.driver import CreatableFormat, CreateRequest, Encrypted, KeySlotted, OpenRequest, SlotChange
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks import slot_changes
from tapfs.kernel.cryptography import EngineCryptography
from tapfs.plan import Plan, Step
from tapfs.testing.crash import in_wrong_order
from tapfs.testing.model import MemoryFile

CRYPTOGRAPHY = EngineCryptography("image")
QUICK = {"iter-time": "1"}


def new_image(kind: str) -> MemoryFile:
    found = format_named(kind)
    assert isinstance(found, CreatableFormat)
    options = {f"encrypt.{key}": value for key, value in QUICK.items()} if kind == "qcow2" else QUICK
    request = CreateRequest(
        4096, options=options, encrypted=True, password=b"one", cryptography=CRYPTOGRAPHY, name="image"
    )
    file = MemoryFile()
    file.apply(found.create(request))
    return file.copy()


def key_of(kind: str, file: MemoryFile, password: bytes) -> bytes | None:
    """The key of the image, None if the password opens nothing."""
    driver = format_named(kind).open(file, OpenRequest(further=file))
    assert isinstance(driver, Encrypted)
    try:
        return bytes(driver.unlock(password, CRYPTOGRAPHY))
    except ImageError as error:
        if error.kind is not ErrorKind.DENIED:
            raise
        return None


def change(kind: str, file: MemoryFile, wanted: SlotChange) -> None:
    driver = format_named(kind).open(file, OpenRequest(writable=True, further=file))
    assert isinstance(driver, KeySlotted)
    for plan in driver.change_slots(wanted, CRYPTOGRAPHY):
        file.apply(plan)


# Slot 6 lies across two sectors of the header.
@pytest.mark.parametrize(("kind", "slot"), [("luks", 6)])
def test_the_password_that_stays_opens_the_image_at_every_moment(kind: str, slot: int) -> None:
    choice = random.Random(slot)
    file = new_image(kind)
    key = key_of(kind, file, b"one")
    assert key is not None
    changes = [
        (SlotChange(True, b"one", b"two", slot, 1), b"one", b"two"),
        (SlotChange(False, b"one", slot=slot), b"one", b"two"),
    ]
    for wanted, stays, other in changes:
        change(kind, file, wanted)
        assert key_of(kind, file, stays) == key
        assert key_of(kind, file, other) == (key if wanted.adds else None)
        for epoch in range(len(file.epochs)):
            for _ in range(2):
                left = file.crashed_files(epoch, choice)
                assert key_of(kind, left, stays) == key, (wanted, epoch)
                assert key_of(kind, left, other) in (key, None), (wanted, epoch)
        file = file.copy()


@pytest.mark.parametrize(
    ("sector", "message"),
    [(0, "do not lie between"), (4039, "do not lie between"), (10, "of key slots 3 and 0 overlap")],
)
def test_a_slot_with_an_impossible_place_is_not_filled(sector: int, message: str) -> None:
    file = new_image("luks")
    at = 208 + 48 * 3 + 40  # nobody has looked at the place of a slot that is not in use
    file.data[at : at + 4] = sector.to_bytes(4, "big")
    before = bytes(file.data)
    with pytest.raises(ImageError, match=message) as caught:
        change("luks", file, SlotChange(True, b"one", b"two", 3, 1))
    assert (caught.value.kind, bytes(file.data)) == (ErrorKind.CORRUPT, before)


def test_the_test_notices_a_state_that_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot whose state is durable before its fields and its material are."""
    right = slot_changes.plan

    def backwards(*stages: list[Step]) -> Plan:
        return in_wrong_order(right(*stages), "reversed")

    monkeypatch.setattr(slot_changes, "plan", backwards)
    image = new_image("luks")
    driver = format_named("luks").open(image, OpenRequest(writable=True, further=image))
    assert isinstance(driver, KeySlotted)
    (made,) = driver.change_slots(SlotChange(True, b"one", b"two", 6, 1), CRYPTOGRAPHY)
    image.apply(Plan(made.stages[:1]))
    seen = format_named("luks").open(image.copy(), OpenRequest(further=image))
    assert isinstance(seen, Encrypted)
    assert len(seen.details()["slots"]) == 2  # type: ignore[arg-type]
