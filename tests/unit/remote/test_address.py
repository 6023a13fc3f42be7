"""Addresses: what a name elsewhere means, beside what, and below what."""

from __future__ import annotations

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.host.gate import Gate
from tapfs.host.location import file_name, locate, locate_parent, stored_parent
from tapfs.host.remote.address import Address


def address(text: str) -> Address:
    found = Address.parse(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("child", "name", "parent"),
    [
        ("https://host/a/over.qcow2", "base.qcow2", "https://host/a/base.qcow2"),
        ("https://host/a/over.qcow2?sign=1", "base.qcow2", "https://host/a/base.qcow2"),
        ("https://host/a/over.qcow2", "../b/base 1%.qcow2", "https://host/b/base%201%25.qcow2"),
        ("https://host/a/over.qcow2", "../../../etc/passwd", "https://host/etc/passwd"),
        ("https://host/a/over.qcow2", "/etc/passwd", "https://host/etc/passwd"),
        ("https://host", "base", "https://host/base"),
        ("s3://bucket/a/over.qcow2", "base.qcow2", "s3://bucket/a/base.qcow2"),
        ("nbd+unix:///over?socket=/run/s", "base", "nbd+unix:///base?socket=/run/s"),
        ("rbd:pool/over", "base", "rbd:pool/base"),
        ("/here/over.qcow2", "https://host/base", "https://host/base"),
    ],
)
def test_a_parent_is_looked_for_beside_its_child(child: str, name: str, parent: str) -> None:
    location = locate_parent(child, name)
    assert (location.name, location.from_image) == (parent, True)
    assert location.identity() == locate(parent).identity()


@pytest.mark.parametrize(
    ("root", "text", "below"),
    [
        ("https://host/a", "https://host/a/x.qcow2", True),
        ("https://host/a/", "https://HOST/a/x.qcow2", True),
        ("https://host", "https://host/x", True),
        ("https://host/a", "https://host/ab/x", False),
        ("https://host/a", "https://host.evil/a/x", False),
        ("https://host", "https://host@evil/x", False),
        ("https://host/a", "http://host/a/x", False),
        ("https://host/a", "https://host:8443/a/x", False),
        ("https://host/a", "https://host/a/../b", False),
        ("https://host/a", "https://host/a/%2e%2e/b", False),
        ("https://host/a", "https://host/a/..%2fb", False),
        ("https://host/a", "https://host/a/..%5Cb", False),
        ("s3://bucket", "s3://bucket/x", True),
        ("nbd://host", "nbd://host/x", False),
        ("nbd+unix:///x?socket=/run/s", "nbd+unix:///x?socket=/run/s", True),
        ("nbd+unix:///x?socket=/run/s", "nbd+unix:///x?socket=/run/t", False),
        ("rbd:pool/a", "rbd:pool/a:conf=/tmp/x", False),
    ],
)
def test_what_lies_below_a_root(root: str, text: str, *, below: bool) -> None:
    assert address(text).lies_below(address(root)) is below
    if below:
        Gate.inside("/here", root).judge_address(address(text))
        return
    with pytest.raises(ImageError) as raised:
        Gate.inside("/here", root).judge_address(address(text))
    assert raised.value.kind is ErrorKind.DENIED


def test_no_gate_and_no_folder_lets_an_address_through() -> None:
    for gate in (Gate(), Gate.nothing(), Gate.inside("/")):
        with pytest.raises(ImageError):
            gate.judge_address(address("https://host/x"))
        with pytest.raises(ImageError):
            locate_parent("over.qcow2", "https://host/x").open(gate=gate)


def test_names_of_files_and_addresses_are_told_apart() -> None:
    assert stored_parent("https://host/x") == "https://host/x"
    assert file_name("https://host/x") == "./https://host/x"
    assert str(address("https://me:secret@host/x")) == "https://me:***@host/x"
    assert locate("./https://host/x").address is None


@pytest.mark.parametrize(
    "text", ["http://[::1/x", "https://host:99999/x", "s3://[b/x", "nbd://host:70000/", "nbd://[/"]
)
def test_what_makes_no_address_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="is no address") as caught:
        locate(text).open(writable=False)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_no_message_has_the_password() -> None:
    assert str(address("https://me:secret@host/a:secret@b")) == "https://me:***@host/a:secret@b"
    assert str(address("nbd://me:secret@[::1/")) == "nbd://me:***@[::1/"
    assert str(address("https://me@host/x")) == "https://me@host/x"
