"""Numbers and names of virtual disks (xen-vbd-interface(7)), states, and what a directory is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import Device, State, parse_state, parse_vdev, vdev_name


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("xvda", 51712),
        ("/dev/xvda1", 51713),
        ("d0", 51712),
        ("d1p2", 202 << 8 | 1 << 4 | 2),
        ("xvdp15", 202 << 8 | 0xFF),
        ("xvdq", 1 << 28 | 16 << 8),
        ("xvda16", 1 << 28 | 16),
        ("xvdtq37", 1 << 28 | 536 << 8 | 37),
        ("d536p37", 1 << 28 | 536 << 8 | 37),
        ("d1048575p255", 1 << 28 | 1048575 << 8 | 255),
        ("sda", 2048),
        ("sdb3", 2048 + 16 + 3),
        ("hda", 768),
        ("hdb63", 768 + 64 + 63),
        ("hdc2", 22 << 8 | 2),
        ("hdd", 22 << 8 | 64),
        ("51712", 51712),
        ("0xca00", 51712),
    ],
)
def test_names_have_the_numbers_of_the_document(name: str, number: int) -> None:
    assert parse_vdev(name) == number


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "xvd",
            "xvda0",
            "xvda01",
            "XVDA",
            "xvda256",
            "d1048576",
            "xvdzzzzz",
            "sdq",
            "sda16",
            "hde",
            "hda64",
            "vda",
        ),
        *("d0p", "0", "-1", "01", "0x", "0x20000000", "536870912", "/dev/51712", "xvda\n", "xvda,w", "٣", "/dev//xvda"),
        "hdc:cdrom",
    ],
)
def test_what_is_no_disk_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="is no name of a virtual disk; use xvda") as raised:
        parse_vdev(text)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT


def test_numbers_are_called_as_the_guest_calls_them() -> None:
    names = {51712: "xvda", 51713: "xvda1", 1 << 28 | 26 << 8: "xvdaa", 2051: "sda3", 22 << 8 | 65: "hdd1"}
    assert {number: vdev_name(number) for number in names} == names


def test_a_number_that_no_name_stands_for_is_its_own_name() -> None:
    # The first is xvda in the extended form, which the name does not stand for.
    for number in (1 << 28, 1 << 28 | 3 << 8 | 15, 3 << 8 | 128, 5, 7 << 8):
        assert vdev_name(number) == str(number)


@given(st.integers(1, (2 << 28) - 1) | st.integers(3 << 8, 4 << 8) | st.integers(22 << 8, 23 << 8))
def test_every_name_is_its_number_again(number: int) -> None:
    assert parse_vdev(vdev_name(number)) == number


@given(st.sampled_from(["xvd", "sd", "hd"]), st.text("abcdz", min_size=1, max_size=4), st.integers(0, 300))
def test_every_name_that_is_taken_is_the_number_s_name(prefix: str, letters: str, partition: int) -> None:
    name = f"{prefix}{letters}{partition or ''}"
    try:
        number = parse_vdev(name)
    except ImageError:
        return
    assert vdev_name(number) == name


def test_a_device_knows_its_places() -> None:
    device = Device("tap", 3, 51712)
    assert device.backend == "/local/domain/0/backend/tap/3/51712"
    assert device.frontend == "/local/domain/3/device/vbd/51712"
    assert (device.name, device.key, str(device)) == ("xvda", "3-51712", "domain 3 xvda")


def test_states_of_guests_may_be_anything() -> None:
    assert [parse_state(text) for text in ("1", "4", "6", "8")] == [
        State.INITIALISING,
        State.CONNECTED,
        State.CLOSED,
        State.RECONFIGURED,
    ]
    for text in (None, "", "9", "-1", "04", "4\n", "connected", "٣", "4" * 5000):
        assert parse_state(text) is State.UNKNOWN
