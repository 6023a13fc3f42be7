"""LUKS1 containers: made by tapfs and read again, their options, damage, and what a second reader says of them."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs import ErrorKind, ImageError
from tests import luks_images as made
from tests.conftest import Ran

Run = Callable[..., Ran]
SIZE = 1 << 20
FAST = "iter-time=1"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_bytes(made.PASSWORD + b"\n")
    return path


@pytest.fixture
def container(tapfs: Run, tmp_path: Path, key_file: Path) -> Path:
    """A new container of a MiB, its disk full of noise of its own."""
    path = tmp_path / "container"
    assert tapfs("create", "-f", "luks", "-o", FAST, "--key-file", key_file, path, SIZE) == (0, "", "")
    return path


def error_of(path: Path, password: bytes = made.PASSWORD) -> ImageError:
    with pytest.raises(ImageError) as caught, tapfs_package.open(path, format="luks", password=password) as disk:
        disk.read(0, 1)
    return caught.value


def test_the_second_reader_finds_the_key_and_the_data(container: Path) -> None:
    """LUKS1 specification, section "Master key recovery", step by step."""
    plain = random.Random(2).randbytes(1536)
    with tapfs_package.open(container, format="luks", password=made.PASSWORD, writable=True) as disk:
        assert disk.size == SIZE
        disk.write(1024, plain)
    data = container.read_bytes()
    name, mode, digest = (data[at : at + 32].rstrip(b"\0").decode() for at in (8, 40, 72))
    assert (name, mode, digest) == ("aes", "xts-plain64", "sha256")
    payload, length = struct.unpack_from(">II", data, 104)
    assert (payload, length) == (4040, 64)
    proof, proof_salt, proof_iterations = struct.unpack_from(">20s32sI", data, 112)
    state, iterations, salt, material, stripes = struct.unpack_from(">II32sII", data, 208)
    assert (state, material, stripes) == (0x00AC71F3, 8, 4000)
    assert [struct.unpack_from(">I", data, 208 + 48 * slot)[0] for slot in range(1, 8)] == [0xDEAD] * 7
    derived = hashlib.pbkdf2_hmac("sha256", made.PASSWORD, salt, iterations, length)
    # The stripes are decrypted by the engine, whose cipher has a test of its own; the merging is done here.
    split = decrypted(derived, data[material * 512 :][: 500 * 512])
    block = bytes(length)
    for at in range(0, length * (stripes - 1), length):
        block = made.diffuse(bytes(a ^ b for a, b in zip(block, split[at : at + length], strict=True)))
    key = bytes(a ^ b for a, b in zip(block, split[length * (stripes - 1) :][:length], strict=True))
    assert hashlib.pbkdf2_hmac("sha256", key, proof_salt, proof_iterations, 20) == proof
    assert data[payload * 512 + 1024 :][:1536] == made.xts_sectors(key, plain, first=2)
    assert made.PASSWORD not in data
    assert key not in data


def decrypted(key: bytes, data: bytes) -> bytes:
    from tapfs.driver import Cipher, CipherAlgorithm, CipherMode
    from tapfs.kernel.cryptography import EngineCryptography

    cipher = Cipher(CipherAlgorithm.AES, CipherMode.XTS, len(key))
    return bytes(EngineCryptography(None).decrypt(cipher, key, data))


@pytest.mark.parametrize(
    "options",
    [
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv",
        "cipher-alg=aes-192,cipher-mode=xts,ivgen-alg=plain",
        "cipher-alg=aes-256,cipher-mode=ctr,hash-alg=sha512",
        "cipher-alg=aes-128,cipher-mode=ecb,hash-alg=sha1",
        "cipher-alg=serpent-256,cipher-mode=xts,hash-alg=ripemd160",
        "cipher-alg=serpent-192,cipher-mode=cbc",
        "cipher-alg=twofish-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=md5",
        "cipher-alg=twofish-192,cipher-mode=xts",
        "cipher-alg=cast5-128,cipher-mode=ctr,hash-alg=sm3",
    ],
)
def test_every_cipher_there_and_back(tapfs: Run, tmp_path: Path, key_file: Path, options: str) -> None:
    plain, path, out = tmp_path / "plain", tmp_path / "container", tmp_path / "out"
    plain.write_bytes(random.Random(options).randbytes(70_144).ljust(200_704, b"\0"))
    words = ("-O", "luks", "-o", f"{FAST},{options}", "--target-key-file", key_file, "-f", "raw", plain, path)
    assert tapfs("convert", *words) == (0, "", "")
    assert tapfs("convert", "-f", "luks", "--key-file", key_file, "-O", "raw", path, out) == (0, "", "")
    assert out.read_bytes() == plain.read_bytes()
    assert plain.read_bytes()[:512] not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("cipher-alg=des-56", "no cipher like aes-256"),
        ("cipher-alg=aes-512", "aes has no keys of 512 bits"),
        ("cipher-mode=gcm", "must be one of ecb, cbc, ctr, xts"),
        ("cipher-alg=cast5-128", "cast5-xts"),
        ("ivgen-alg=benbi", "must be one of plain, plain64, essiv"),
        ("cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha1", "gives no key"),
        ("hash-alg=md17", "'md17'"),
        ("iter-time=0", "milliseconds"),
        ("iter-time=soon", "milliseconds"),
        ("encrypt.iter-time=5", "unknown option"),
    ],
)
def test_options_that_cannot_be(tapfs: Run, tmp_path: Path, key_file: Path, options: str, words: str) -> None:
    ran = tapfs("create", "-f", "luks", "-o", options, "--key-file", key_file, tmp_path / "container", SIZE)
    assert ran.code == 12
    assert words in ran.err
    assert not (tmp_path / "container").exists()


def test_without_a_password_there_is_no_container(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="needs a password"):
        tapfs_package.create(tmp_path / "container", "luks", SIZE)


def test_sizes_are_whole_sectors(tapfs: Run, tmp_path: Path, key_file: Path) -> None:
    ran = tapfs("create", "-f", "luks", "-o", FAST, "--key-file", key_file, tmp_path / "container", 700)
    assert (ran.code, "whole sectors" in ran.err) == (13, True)


def test_a_wrong_password_is_denied(tapfs: Run, container: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPFS_PASSWORD", "a wrong secret")
    ran = tapfs("convert", "-f", "luks", "-O", "raw", container, container.with_suffix(".raw"))
    assert (ran.code, ran.err) == (19, f"tapfs: error: {container}: the password opens none of its key slots\n")
    assert not container.with_suffix(".raw").exists()


def test_no_slot_in_use(container: Path) -> None:
    data = bytearray(container.read_bytes())
    data[208:212] = (0xDEAD).to_bytes(4, "big")
    container.write_bytes(data)
    assert "no key slot is in use" in str(error_of(container))


#: A place in the header, the bytes that are put there, the kind of the refusal and words of it.
DAMAGE: dict[str, tuple[int, bytes, ErrorKind, str]] = {
    "version": (6, b"\0\7", ErrorKind.UNSUPPORTED, "version 7"),
    "cipher": (8, b"camellia", ErrorKind.UNSUPPORTED, "camellia-xts-plain64"),
    "mode": (40, b"xts-benbi\0\0", ErrorKind.UNSUPPORTED, "aes-xts-benbi"),
    "digest": (72, b"md17\0\0", ErrorKind.UNSUPPORTED, "'md17'"),
    "key length": (108, (65).to_bytes(4, "big"), ErrorKind.UNSUPPORTED, "520 bits"),
    "payload": (104, (1 << 31).to_bytes(4, "big"), ErrorKind.CORRUPT, "past the end"),
    "detached": (104, bytes(4), ErrorKind.UNSUPPORTED, "detached header"),
    "state": (208, b"\1\2\3\4", ErrorKind.CORRUPT, "key slot 0 is neither in use nor free"),
    "iterations": (212, b"\xff" * 4, ErrorKind.OUT_OF_BOUNDS, "4294967295 iterations"),
    "digest iterations": (164, b"\xff" * 4, ErrorKind.OUT_OF_BOUNDS, "4294967295 iterations"),
    "material": (248, bytes(4), ErrorKind.CORRUPT, "stripes of key slot 0"),
    "material behind": (248, (4000).to_bytes(4, "big"), ErrorKind.CORRUPT, "stripes of key slot 0"),
    "stripes": (252, b"\xff" * 4, ErrorKind.CORRUPT, "4294967295 stripes"),
    "no stripes": (252, bytes(4), ErrorKind.CORRUPT, "0 stripes"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(container: Path, what: str) -> None:
    at, put, kind, words = DAMAGE[what]
    data = bytearray(container.read_bytes())
    data[at : at + len(put)] = put
    container.write_bytes(data)
    error = error_of(container)
    assert error.kind is kind, error
    assert words in str(error)
    assert error.path == str(container)


@pytest.mark.parametrize("length", [8, 591, 4096, 300_000])
def test_a_cut_container(container: Path, length: int) -> None:
    container.write_bytes(container.read_bytes()[:length])
    assert error_of(container).kind in {ErrorKind.INVALID_FORMAT, ErrorKind.CORRUPT}


def test_a_guess_is_raw_and_info_says_how_to_open_it(tapfs: Run, container: Path) -> None:
    """A guest that encrypts its whole disk writes the same bytes."""
    out = tapfs("info", container).out
    assert "format:         raw" in out
    assert "-f luks" in out


def test_the_map_is_all_data(tapfs: Run, container: Path) -> None:
    assert tapfs("map", "-f", "luks", container).out.split()[-4:] == ["0x0", "0x100000", "encrypted", str(container)]


def test_zeros_of_a_source_are_written(tapfs: Run, tmp_path: Path, key_file: Path) -> None:
    """What nobody writes is noise in a container, and the disk has to be the same."""
    plain, path = tmp_path / "plain", tmp_path / "container"
    with plain.open("wb") as file:
        file.truncate(3 << 20)
    words = ("-O", "luks", "-o", FAST, "--target-key-file", key_file, "-f", "raw", plain, path)
    assert tapfs("convert", *words) == (0, "", "")
    with tapfs_package.open(path, format="luks", password=made.PASSWORD) as disk:
        assert not any(disk.read(0, disk.size))
