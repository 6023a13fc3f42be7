"""LUKS2 containers made by a second writer: what is read of them, which header counts, what is refused."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests import luks_images as made
from tests.conftest import Ran

Run = Callable[..., Ran]
PLAIN = random.Random(0).randbytes(8192)


def written(folder: Path, data: bytes) -> Path:
    path = folder / "container"
    path.write_bytes(data)
    return path


def refusal(path: Path, password: bytes = made.PASSWORD) -> ImageError:
    with pytest.raises(ImageError) as caught, tapfs.open(path, format="luks", password=password) as disk:
        disk.read(0, 1)
    assert str(path) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(("sector", "tweak"), [(512, 0), (4096, 0), (2048, 7), (512, (1 << 33) + 5)])
def test_read_and_written(tmp_path: Path, sector: int, tweak: int) -> None:
    path = written(tmp_path, made.simple_2(PLAIN, sector=sector, tweak=tweak))
    with tapfs.open(path, format="luks", password=made.PASSWORD, writable=True) as disk:
        assert disk.read(0, disk.size) == PLAIN
        disk.write(4000, b"changed")
        disk.write_zeroes(4096, 100)
    changed = bytearray(PLAIN)
    changed[4000:4007] = b"changed"
    changed[4096:4196] = bytes(100)
    assert path.read_bytes() == made.simple_2(bytes(changed), sector=sector, tweak=tweak)


def test_info_tells_the_header_and_no_secret(tapfs: Run, tmp_path: Path) -> None:
    path = written(tmp_path, made.simple_2(PLAIN, sector=4096))
    ran = tapfs("info", "--json", "-f", "luks", path)
    details = json.loads(ran.out)["details"]
    assert details == {
        "version": 2,
        "uuid": "the-uuid",
        "label": "a label",
        "cipher": "aes-xts-plain64",
        "key_bits": 512,
        "sector_size": 4096,
        "payload_offset": made.PAYLOAD_2,
        "slots": [{"number": 0, "kdf": "pbkdf2-sha256", "iterations": made.FAST, "memory": None, "lanes": None}],
        "header_fault": None,
    }
    assert "slots:          number 0, kdf pbkdf2-sha256, iterations 1000" in tapfs("info", "-f", "luks", path).out


@pytest.mark.parametrize("damaged", ["first", "second", "no first", "older first"])
def test_the_other_header_is_used_where_one_is_damaged(tapfs: Run, tmp_path: Path, damaged: str) -> None:
    described, material = made.metadata_2(random.Random(1))
    sequences = (2, 3) if damaged == "older first" else (3, 3)
    data = bytearray(made.container_2(PLAIN, described, material, sequences=sequences))
    if damaged == "first":
        data[5000] ^= 1
    elif damaged == "second":
        data[made.HEADER_2 + 5000] ^= 1
    elif damaged == "no first":
        data[:4096] = bytes(4096)
    path = written(tmp_path, bytes(data))
    with_password(path)
    assert "header fault" in tapfs("info", "-f", "luks", path).out


def with_password(path: Path) -> None:
    with tapfs.open(path, format="luks", password=made.PASSWORD) as disk:
        assert disk.read(0, disk.size) == PLAIN


def test_both_headers_damaged(tmp_path: Path) -> None:
    data = bytearray(made.simple_2(PLAIN))
    data[5000] ^= 1
    data[made.HEADER_2 + 5000] ^= 1
    error = refusal(written(tmp_path, bytes(data)))
    assert error.kind is ErrorKind.CORRUPT
    assert "another checksum" in str(error)


def test_a_wrong_password_is_denied_and_is_not_told(tmp_path: Path) -> None:
    error = refusal(written(tmp_path, made.simple_2(PLAIN)), b"wrong horse")
    assert (error.kind, error.op) == (ErrorKind.DENIED, "unlock")
    assert "horse" not in str(error)


def test_slots_are_tried_by_priority_and_ignored_ones_are_not(tmp_path: Path) -> None:
    described, material = made.metadata_2(random.Random(1))
    described["keyslots"]["0"]["priority"] = 0
    described["keyslots"]["1"] = described["keyslots"]["0"] | {"priority": 2}
    described["digests"]["0"]["keyslots"] = ["1", "0"]
    path = written(tmp_path, made.container_2(PLAIN, described, material))
    with_password(path)
    described["keyslots"]["1"]["kdf"] = described["keyslots"]["1"]["kdf"] | {"salt": made.encoded(b"other" * 6)}
    error = refusal(written(tmp_path, made.container_2(PLAIN, described, material)))
    assert error.kind is ErrorKind.DENIED


Change = Callable[[dict[str, Any]], object]


def slot_of(described: dict[str, Any]) -> dict[str, Any]:
    return described["keyslots"]["0"]  # type: ignore[no-any-return]


def segment_of(described: dict[str, Any]) -> dict[str, Any]:
    return described["segments"]["0"]  # type: ignore[no-any-return]


#: What is changed in the JSON, the kind of the refusal, and words of it.
REFUSED: dict[str, tuple[Change, ErrorKind, str]] = {
    "requirement": (
        lambda it: it["config"].update(requirements={"mandatory": ["online-reencrypt-v2"]}),
        ErrorKind.UNSUPPORTED,
        "online-reencrypt-v2",
    ),
    "two segments": (lambda it: it["segments"].update({"1": segment_of(it)}), ErrorKind.UNSUPPORTED, "2 segments"),
    "linear": (lambda it: segment_of(it).update(type="linear"), ErrorKind.UNSUPPORTED, "'linear'"),
    "integrity": (lambda it: segment_of(it).update(integrity={}), ErrorKind.UNSUPPORTED, "dm-integrity"),
    "cipher": (
        lambda it: segment_of(it).update(encryption="camellia-xts-plain64"),
        ErrorKind.UNSUPPORTED,
        "camellia-xts-plain64",
    ),
    "key of 40 bytes": (lambda it: slot_of(it).update(key_size=40), ErrorKind.UNSUPPORTED, "320 bits"),
    "sectors": (lambda it: segment_of(it).update(sector_size=8192), ErrorKind.CORRUPT, "8192"),
    "payload past the end": (lambda it: segment_of(it).update(offset=str(1 << 40)), ErrorKind.CORRUPT, "past the end"),
    "payload too long": (lambda it: segment_of(it).update(size=str(1 << 40)), ErrorKind.CORRUPT, "past the end"),
    "negative": (lambda it: segment_of(it).update(iv_tweak=-1), ErrorKind.CORRUPT, "segments.0.iv_tweak"),
    "no number": (lambda it: segment_of(it).update(offset="all"), ErrorKind.CORRUPT, "segments.0.offset"),
    "no base64": (lambda it: slot_of(it)["kdf"].update(salt="*"), ErrorKind.CORRUPT, "keyslots.0.kdf.salt"),
    "no keyslots": (lambda it: it.pop("keyslots"), ErrorKind.CORRUPT, "keyslots"),
    "unnumbered": (lambda it: it["keyslots"].update(x={}), ErrorKind.CORRUPT, "'x'"),
    "no slot of the key": (lambda it: it["digests"]["0"].update(keyslots=[]), ErrorKind.UNSUPPORTED, "no key slot"),
    "stripes in the header": (lambda it: slot_of(it)["area"].update(offset="4096"), ErrorKind.CORRUPT, "stripes"),
    "many stripes": (lambda it: slot_of(it)["af"].update(stripes=1 << 30), ErrorKind.CORRUPT, "stripes"),
    "unknown kdf": (lambda it: slot_of(it)["kdf"].update(type="scrypt"), ErrorKind.UNSUPPORTED, "'scrypt'"),
    "unknown digest": (lambda it: slot_of(it)["kdf"].update(hash="md17"), ErrorKind.UNSUPPORTED, "'md17'"),
    "many iterations": (
        lambda it: slot_of(it)["kdf"].update(iterations=(1 << 32) - 1),
        ErrorKind.OUT_OF_BOUNDS,
        "4294967295 iterations",
    ),
    "no iterations": (lambda it: slot_of(it)["kdf"].update(iterations=0), ErrorKind.OUT_OF_BOUNDS, "0 iterations"),
    "digest of many iterations": (
        lambda it: it["digests"]["0"].update(iterations=1 << 30),
        ErrorKind.OUT_OF_BOUNDS,
        "iterations",
    ),
    "much memory": (
        lambda it: slot_of(it)["kdf"].update(type="argon2id", time=1, memory=8 << 20, cpus=1),
        ErrorKind.OUT_OF_BOUNDS,
        "8192 MiB",
    ),
    "many passes": (
        lambda it: slot_of(it)["kdf"].update(type="argon2id", time=1 << 31, memory=1 << 20, cpus=1),
        ErrorKind.OUT_OF_BOUNDS,
        "passes",
    ),
    "many lanes": (
        lambda it: slot_of(it)["kdf"].update(type="argon2i", time=1, memory=1 << 16, cpus=1 << 20),
        ErrorKind.OUT_OF_BOUNDS,
        "lanes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path: Path, what: str) -> None:
    change, kind, words = REFUSED[what]
    described, material = made.metadata_2(random.Random(1))
    change(described)
    error = refusal(written(tmp_path, made.container_2(PLAIN, described, material)))
    assert error.kind is kind, error
    assert words in str(error)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"[" * 11_000, b'{"config": 7}', b"\xff\xff"])
def test_json_that_is_none(tmp_path: Path, text: bytes) -> None:
    headers = b"".join(made.header_2({}, offset=offset, text=text) for offset in (0, made.HEADER_2))
    error = refusal(written(tmp_path, headers.ljust(made.PAYLOAD_2 + 512, b"\0")))
    assert error.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize("length", [0, 7, 4095, 4096, 16384, 40000, made.PAYLOAD_2 - 1])
def test_a_cut_container(tmp_path: Path, length: int) -> None:
    error = refusal(written(tmp_path, made.simple_2(PLAIN)[:length]))
    assert error.kind in {ErrorKind.INVALID_FORMAT, ErrorKind.CORRUPT}


def test_garbage_is_no_container(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, PLAIN)).kind is ErrorKind.INVALID_FORMAT


@pytest.mark.parametrize("variant", ["argon2i", "argon2id"])
def test_argon2_opens_a_slot(tmp_path: Path, variant: str) -> None:
    path = written(tmp_path, with_argon2(variant))
    with_password(path)
    assert refusal(path, b"wrong").kind is ErrorKind.DENIED


def with_argon2(variant: str) -> bytes:
    """A container whose only slot needs Argon2."""
    from argon2.low_level import Type, hash_secret_raw

    choice = random.Random(3)
    described, _ = made.metadata_2(choice)
    salt = choice.randbytes(32)
    kind = Type.I if variant == "argon2i" else Type.ID
    derived = hash_secret_raw(made.PASSWORD, salt, time_cost=2, memory_cost=64, parallelism=2, hash_len=32, type=kind)
    derivation = {"type": variant, "time": 2, "memory": 64, "cpus": 2, "salt": made.encoded(salt)}
    described["keyslots"]["0"], material = made.slot_2(derivation, derived, choice)
    return made.container_2(PLAIN, described, material)


def test_without_the_library_of_argon2_the_remedy_is_named(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, with_argon2("argon2id"))
    monkeypatch.setitem(sys.modules, "argon2.low_level", None)
    monkeypatch.setenv("TAPFS_PASSWORD", "correct horse")
    ran = tapfs("convert", "-f", "luks", "-O", "raw", path, tmp_path / "out")
    assert ran.code == 12
    assert "pip install 'tapfs[luks]'" in ran.err
