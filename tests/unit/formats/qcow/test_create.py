"""New images: the bytes that qemu-img and the blktap tools wrote."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tapfs.driver import BackingReference, CreateRequest, OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow import FORMAT
from tapfs.testing.model import MemoryFile
from tests.qcow_images import created

MIB = 1 << 20


def header(*words: str) -> bytes:
    return bytes.fromhex("".join(words))


def test_blktap_standalone_golden() -> None:
    data = bytes(created(64 * MIB, {"blktap": "on"}).data)
    assert data[:64] == header(
        "514649fb 00000001 0000000000000000 00000000 00000000 0000000004000000 0c09 0000 00000000",
        "0000000000001000 58454efb 91978a34 00000200 00000003",
    )
    assert len(data) == 8192
    assert not any(data[64:])


def test_blktap_reserve_golden() -> None:
    data = bytes(created(8 * MIB, {"blktap": "on", "reserve": "on"}).data)
    assert data[48:64] == header("58454efb 4b8fbc70 00000200 00000002")
    assert len(data) == 8398848


def test_blktap_overlay_golden() -> None:
    data = bytes(created(10 * MIB, {"blktap": "on"}, "/images/base.raw").data)
    assert data[32:34] == header("090c")
    assert data[48:64] == header("58454efb e9384bfd 00000001 00000003")
    assert data[64:80] == b"/images/base.raw"
    assert data[8:24] == header("0000000000000040 00000010 499602d2")
    assert len(data) == 8192


def test_the_fixtures_of_qcow_create_are_made_again(blktap_images: dict[str, object]) -> None:
    for name, size, options in [
        ("empty-2007-sparse", 6 * MIB, {"blktap": "on"}),
        ("empty-2007-reserved", 8 * MIB, {"blktap": "on", "reserve": "on"}),
    ]:
        original = blktap_images[name].path.read_bytes()  # type: ignore[attr-defined]
        made = created(size, options).data
        made[60:64] = original[60:64]  # the flags are those of the last release
        assert bytes(made) == original


@pytest.mark.parametrize("size", [512, 1000, 1_000_000, 64 * MIB, 1 << 30, 100 << 30])
@pytest.mark.parametrize("backing", [None, "base.raw", "a-longer-name/of-the-base.raw"])
def test_without_options_the_file_is_qemus(size: int, backing: str | None, tmp_path: Path) -> None:
    if backing and size > 1 << 30:
        size = 1 << 33
    peer = tmp_path / "peer.qcow"
    words: list[str] = []
    if backing:
        below = tmp_path / backing
        below.parent.mkdir(exist_ok=True)
        with below.open("wb") as file:
            file.truncate(512)
        words = ["-b", backing, "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow", *words, peer, str(size)], check=True)
    assert bytes(created(size, backing=backing).data) == peer.read_bytes()


def test_encrypted_without_options_the_file_is_qemus(tmp_path: Path) -> None:
    peer = tmp_path / "peer.qcow"
    secret = ["--object", "secret,id=key,data=secret", "-o", "encrypt.format=aes,encrypt.key-secret=key"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow", *secret, peer, "5M"], check=True)
    assert bytes(created(5 * MIB, encrypted=True).data) == peer.read_bytes()


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("backing", [None, "base"])
def test_cluster_size(cluster_size: int, backing: str | None) -> None:
    driver = FORMAT.open(created(MIB, {"cluster_size": str(cluster_size)}, backing), OpenRequest())
    assert driver.geometry.granule == cluster_size
    assert driver.header.l2_length == cluster_size


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (CreateRequest(0), ErrorKind.OUT_OF_BOUNDS, "0 bytes"),
        (CreateRequest(1 << 63), ErrorKind.OUT_OF_BOUNDS, "too many"),
        (CreateRequest(1 << 50), ErrorKind.OUT_OF_BOUNDS, "too many"),
        (CreateRequest(MIB, BackingReference("x" * 1024)), ErrorKind.OUT_OF_BOUNDS, "1024"),
        (CreateRequest(MIB, BackingReference("")), ErrorKind.UNSUPPORTED, "name"),
        (CreateRequest(MIB, BackingReference("a\0b")), ErrorKind.UNSUPPORTED, "name"),
        (CreateRequest(MIB, options={"clutser_size": "512"}), ErrorKind.UNSUPPORTED, "clutser_size"),
        (CreateRequest(MIB, options={"cluster_size": "513"}), ErrorKind.UNSUPPORTED, "513"),
        (CreateRequest(MIB, options={"cluster_size": "131072"}), ErrorKind.UNSUPPORTED, "131072"),
        (CreateRequest(MIB, options={"cluster_size": "4k"}), ErrorKind.UNSUPPORTED, "4k"),
        (CreateRequest(MIB, options={"blktap": "yes"}), ErrorKind.UNSUPPORTED, "yes"),
        (CreateRequest(MIB, options={"reserve": "on"}), ErrorKind.UNSUPPORTED, "blktap=on"),
        (CreateRequest(MIB, options={"blktap": "on"}, encrypted=True), ErrorKind.UNSUPPORTED, "encryption"),
        (CreateRequest(MIB, options={"blktap": "on", "cluster_size": "512"}), ErrorKind.UNSUPPORTED, "cluster sizes"),
        (CreateRequest(MIB, BackingReference("base"), options={"blktap": "on"}), ErrorKind.UNSUPPORTED, "absolute"),
    ],
)
def test_what_qcow_cannot_hold_is_refused(request_: CreateRequest, kind: ErrorKind, words: str) -> None:
    with pytest.raises(ImageError, match=words) as refused:
        FORMAT.create(request_)
    assert refused.value.kind is kind


@pytest.mark.parametrize("kind", [{}, {"blktap": "on"}])
def test_the_largest_image_opens_and_checks(kind: dict[str, str]) -> None:
    file = MemoryFile()
    file.apply(FORMAT.create(CreateRequest(32 << 40, options=kind)))
    driver = FORMAT.open(file, OpenRequest())
    assert driver.check().corruptions == 0
    assert len(driver.map(0, 32 << 40)) == 1
