"""Passwords of LUKS images are added and removed: QEMU opens with those that are there and with no other."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError

Run = Callable[..., Any]
QUICK = "encrypt.iter-time=1"


def test_qemu_opens_with_the_passwords_that_are_there(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    keys = {name: tmp_path / name for name in ("one", "two", "three")}
    for name, path in keys.items():
        path.write_text(f"{name}\n")
    key = ("--key-file", keys["one"])
    assert tapfs("create", "-f", "qcow2", *key, "-o", QUICK, image, "64K").code == 0

    def opened_by(name: str) -> bool:
        words = [
            "--object",
            f"secret,id=s,data={name}",
            "--image-opts",
            f"driver=qcow2,encrypt.key-secret=s,file.filename={image}",
        ]
        done = subprocess.run(["qemu-io", *words, "-c", "read 0 512"], capture_output=True, text=True, check=False)
        return done.returncode == 0

    def amend(password: str, *words: object) -> Any:
        return tapfs("amend", "-f", "qcow2", "--key-file", keys[password], *words, image)

    active, inactive = f"encrypt.state=active,{QUICK}", "encrypt.state=inactive"
    assert amend("one", "--new-key-file", keys["two"], "-o", active).code == 0
    # Slot 6 lies across two sectors of the header.
    assert amend("two", "--new-key-file", keys["three"], "-o", f"{active},encrypt.keyslot=6").code == 0
    assert [opened_by(name) for name in keys] == [True, True, True]
    assert "is in use" in amend("two", "--new-key-file", keys["three"], "-o", f"{active},encrypt.keyslot=6").err
    assert amend("two", "--old-key-file", keys["one"], "-o", inactive).code == 0
    assert amend("two", "-o", f"{inactive},encrypt.keyslot=6").code == 0
    assert [opened_by(name) for name in keys] == [False, True, False]
    assert amend("one", "--new-key-file", keys["three"], "-o", active).code == 19
    assert "no password would open" in amend("two", "--old-key-file", keys["two"], "-o", inactive).err
    assert opened_by("two")


def test_python_adds_and_removes_passwords(tmp_path: Path) -> None:
    image = tmp_path / "image"
    options = {"encrypt.iter-time": "1"}
    api.create(image, "qcow2", 65536, options=options, password=b"one")
    api.add_password(image, b"two", password=b"one", milliseconds=1)
    api.remove_password(image, b"one", password=b"two")
    for password, kind in ((b"one", ErrorKind.DENIED), (b"two", None)):
        with api.open(image, password=password) as disk:
            if kind is None:
                assert disk.read(0, 512)
                continue
            with pytest.raises(ImageError) as caught:
                disk.read(0, 512)
            assert caught.value.kind is kind
    with pytest.raises(ImageError, match="opens no key slot"):
        api.remove_password(image, b"one", password=b"two")


def test_words_that_say_too_little_are_refused(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert tapfs("create", "-f", "qcow2", image, "64K").code == 0
    (tmp_path / "key").write_text("key\n")
    key = ("--key-file", tmp_path / "key")
    assert "needs --new-key-file" in tapfs("amend", *key, "-o", "encrypt.state=active", image).err
    assert "is --new-key-file FILE here" in tapfs("amend", *key, "-o", "encrypt.new-secret=x", image).err
    for said in ("encrypt.state=active,compat=1.1", "compat=1.1"):
        both = ("--new-key-file", tmp_path / "key", "-o", said)
        assert "without other options" in tapfs("amend", *key, *both, image).err
    for words, wrong in (
        ("keyslot=\u00b2", "numbers"),
        (f"keyslot={'9' * 5000}", "numbers"),
        ("iter-time=0", "from 1 to"),
    ):
        refused = tapfs(
            "amend", *key, "--new-key-file", tmp_path / "key", "-o", f"encrypt.state=active,encrypt.{words}", image
        )
        assert (refused.code, wrong in refused.err) == (64, True)
    for active in (("-o", "encrypt.state=active"), ()):
        refused = tapfs("amend", *key, "--new-key-file", tmp_path / "key", *active, image)
        assert "is not encrypted with LUKS" in refused.err
