"""UUIDs of `tapfs.identifiers` are those of the standard library, in both orders and as text."""

from __future__ import annotations

import uuid

from tapfs.identifiers import Uuid, new_uuid, random_bits, random_bytes

RAW = bytes(range(0x10, 0x20))


def test_both_orders_and_the_text_are_the_standard_librarys() -> None:
    own, standard = Uuid(RAW), uuid.UUID(bytes=RAW)
    assert (str(own), own.raw, own.bytes_le) == (str(standard), standard.bytes, standard.bytes_le)
    assert str(Uuid.of_bytes_le(RAW)) == str(uuid.UUID(bytes_le=RAW))


def test_equal_uuids_are_one_member_of_a_set() -> None:
    assert {Uuid(RAW), Uuid(bytes(RAW))} == {Uuid(RAW)}
    assert Uuid(RAW) != Uuid(bytes(16))


def test_new_ones_are_random_and_of_version_4() -> None:
    made = {uuid.UUID(str(new_uuid())) for _ in range(50)}
    assert len(made) == 50
    assert {(each.version, each.variant) for each in made} == {(4, uuid.RFC_4122)}


def test_random_numbers_have_so_many_bits() -> None:
    numbers = [random_bits(12) for _ in range(200)]
    assert max(numbers) < 1 << 12
    assert max(numbers) > 1 << 8
    assert len(random_bytes(5)) == 5
