"""Chains whose images have different passwords: QEMU, which is told each of them, reads what tapfs does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError, LayerPasswords

Run = Callable[..., Any]
KIB = 1024
QUICK = "encrypt.iter-time=1"
DONE = (0, "", "")


class Chain:
    """`base` and `top` with a password each, over a plain image of the same folder."""

    def __init__(self, tapfs: Run, folder: Path) -> None:
        self.tapfs = tapfs
        self.base, self.top = folder / "base", folder / "top"
        self.passwords = {self.base: b"of base", self.top: b"of top"}
        self.keys: list[str] = []
        for image, password in self.passwords.items():
            file = folder / f"{image.name}.key"
            file.write_bytes(password + b"\n")
            self.keys += ["--key-file", f"{image}={file}"]
        for image, words in ((self.base, [self.base, "256K"]), (self.top, ["-b", "base", "-F", "qcow2", self.top])):
            assert tapfs("create", "-f", "qcow2", "--key-file", f"{image}.key", "-o", QUICK, *words) == DONE
            with api.open(image, writable=True, password=self.all) as disk:
                disk.write(0 if image == self.base else 100 * KIB, image.name.encode() * 10_000)

    @property
    def all(self) -> LayerPasswords:
        return LayerPasswords(b"", {str(image): password for image, password in self.passwords.items()})

    def content(self, image: Path | None = None) -> bytes:
        with api.open(image or self.top, password=self.all) as disk:
            return disk.read(0, disk.size)

    def by_qemu(self) -> bytes:
        raw = self.top.with_suffix(".raw")
        secrets = [f"secret,id={image.name},data={password.decode()}" for image, password in self.passwords.items()]
        options = (
            f"driver=qcow2,file.filename={self.top},encrypt.key-secret=top,"
            f"backing.driver=qcow2,backing.file.filename={self.base},backing.encrypt.key-secret=base"
        )
        objects = [word for secret in secrets for word in ("--object", secret)]
        subprocess.run(["qemu-img", "convert", *objects, "--image-opts", options, "-O", "raw", raw], check=True)
        return raw.read_bytes()


@pytest.fixture
def chain(tapfs: Run, tmp_path: Path) -> Chain:
    return Chain(tapfs, tmp_path)


def test_qemu_reads_the_same(chain: Chain, tapfs: Run, tmp_path: Path) -> None:
    expected = chain.content()
    assert expected[:4] == b"base"
    assert expected[100 * KIB :][:3] == b"top"
    assert chain.by_qemu() == expected
    raw = tmp_path / "a.raw"
    assert tapfs("convert", *chain.keys, "-O", "raw", chain.top, raw) == DONE
    assert raw.read_bytes() == expected
    refused = tapfs("convert", *chain.keys[2:], "-O", "raw", chain.top, tmp_path / "none")
    assert (refused.code, str(chain.base) in refused.err) == (19, True)
    with api.open(chain.top, password=b"of top") as disk, pytest.raises(ImageError) as wrong:
        disk.read(0, 1)
    assert wrong.value.kind is ErrorKind.DENIED


def test_edits_of_a_chain(chain: Chain, tapfs: Run, tmp_path: Path) -> None:
    expected = chain.content()
    assert tapfs("resize", "-q", *chain.keys, chain.top, "512K").code == 0
    expected = expected.ljust(512 * KIB, b"\0")
    assert chain.by_qemu() == expected
    plain = tmp_path / "plain"
    assert tapfs("convert", *chain.keys, "-O", "qcow2", chain.base, plain) == DONE
    for parent in (plain, chain.base):
        assert tapfs("rebase", *chain.keys, "-b", parent, "-F", "qcow2", chain.top).code == 0
    assert chain.content() == expected
    over = tmp_path / "over"
    words = ["--target-key-file", f"{chain.top}.key", "--encrypt", "-o", QUICK, "-B", str(chain.base), "-F", "qcow2"]
    assert tapfs("convert", *chain.keys, "-O", "qcow2", *words, chain.top, over).code == 0
    chain.passwords[over] = b"of top"
    assert chain.content(over) == expected
    del chain.passwords[over]
    over.unlink()
    assert tapfs("commit", *chain.keys, chain.top).code == 0
    assert chain.content(chain.base) == chain.by_qemu() == expected


def test_a_scratch_overlay_has_a_password_of_its_own(chain: Chain, tmp_path: Path) -> None:
    overlay, before = tmp_path / "scratch", chain.base.read_bytes()
    expected = bytearray(chain.content())
    own = LayerPasswords(b"", {**chain.all.own, str(overlay): b"of the scratch"})
    for passwords in (chain.all, own):
        with api.open(chain.top, overlay=overlay, password=passwords) as disk:
            disk.write(5, b"scratch" * 1000)
            expected[5:7005] = b"scratch" * 1000
            assert disk.read(0, disk.size) == expected
        with api.open(chain.top, overlay=overlay, password=passwords) as disk:
            assert disk.read(0, disk.size) == expected
        assert b"scratchscratch" not in overlay.read_bytes()
        overlay.unlink()
    assert chain.base.read_bytes() == before
