"""Ciphers against libcrypto's own command and against published vectors; sectors, IVs, and where they are counted."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tapfs import ImageError
from tapfs.driver import Cipher, CipherAlgorithm, CipherMode, Geometry, Identity, InitialVector
from tapfs.extent import Extent, Kind
from tapfs.kernel.cryptography import EngineCryptography
from tapfs.kernel.engine import HostDescriptor
from tests.unit.engine.engine_disks import Disk, host, open_host

AES, CBC, XTS = CipherAlgorithm.AES, CipherMode.CBC, CipherMode.XTS
SIZE = 64 << 10


def by_openssl(name: str, key: bytes, vector: bytes, data: bytes) -> bytes:
    words = ["openssl", "enc", f"-{name}", "-nopad", "-K", key.hex(), *(["-iv", vector.hex()] if vector else [])]
    return subprocess.run(words, input=data, capture_output=True, check=True).stdout


def xts_sector(key: bytes, number: int, data: bytes) -> bytes:
    """IEEE 1619, section 5: the tweak is encrypted by the second key and multiplied by alpha for each block."""
    half = len(key) // 2
    name = f"aes-{half * 8}-ecb"
    tweak = int.from_bytes(by_openssl(name, key[half:], b"", number.to_bytes(16, "little")), "little")
    tweaks: list[int] = []
    for _ in range(0, len(data), 16):
        tweaks.append(tweak)
        tweak = (tweak << 1) ^ (0x87 if tweak >> 127 else 0)
        tweak &= (1 << 128) - 1
    mask = b"".join(one.to_bytes(16, "little") for one in tweaks)
    masked = bytes(a ^ b for a, b in zip(data, mask, strict=True))
    return bytes(a ^ b for a, b in zip(by_openssl(name, key[:half], b"", masked), mask, strict=True))


def sector(cipher: Cipher, key: bytes, number: int, data: bytes) -> bytes:
    """One sector, encrypted by the specification."""
    if cipher.iv is InitialVector.PLAIN:
        number &= (1 << 32) - 1
    vector = b"" if cipher.iv is InitialVector.NONE else number.to_bytes(16, "little")
    if cipher.mode is XTS:
        return xts_sector(key, number, data)
    if cipher.iv is InitialVector.ESSIV:
        digest = hashlib.new(cipher.iv_digest, key).digest()
        vector = by_openssl(f"aes-{8 * len(digest)}-ecb", digest, b"", vector)
    return by_openssl(f"aes-{len(key) * 8}-{cipher.mode.name.lower()}", key, vector, data)


def add(disk: Disk, path: Path, geometry: Geometry, key: bytes) -> None:
    descriptor = open_host(path, direct=False)
    disk.descriptors.append(descriptor)
    disk.add_layer(geometry, key=key, files=[HostDescriptor(descriptor, str(path), writable=True)], writable=True)


@pytest.mark.parametrize(
    "cipher",
    [
        Cipher(AES, CBC, 16),
        Cipher(AES, CBC, 24),
        Cipher(AES, CBC, 32, InitialVector.ESSIV, "sha256"),
        Cipher(AES, CBC, 16, InitialVector.ESSIV, "md5"),
        Cipher(AES, CipherMode.CTR, 32),
        Cipher(AES, CipherMode.ECB, 16, InitialVector.NONE),
        Cipher(AES, XTS, 32),
        Cipher(AES, XTS, 64),
        Cipher(AES, XTS, 48),
        Cipher(AES, XTS, 64, InitialVector.PLAIN),
    ],
)
@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_as_specified(tmp_path: Path, cipher: Cipher, sector_bytes: int) -> None:
    key = bytes(range(1, cipher.key_bytes + 1))
    cipher = replace(cipher, sector_bytes=sector_bytes)
    plain = os.urandom(3 * 4096)
    with Disk() as disk:
        path = host(tmp_path, "a", bytes(SIZE))
        add(disk, path, Geometry(SIZE, 4096, SIZE, identity=Identity(), cipher=cipher), key)
        disk.put(plain, 8192)
        for at in range(0, len(plain), sector_bytes):
            number = (8192 + at) // 512
            stored = path.read_bytes()[8192 + at :][:sector_bytes]
            assert stored == sector(cipher, key, number, plain[at : at + sector_bytes])
        # Unaligned, so that the edges are read, changed and written.
        disk.put(b"changed", 8192 + sector_bytes - 3)
        expected = bytearray(plain)
        expected[sector_bytes - 3 : sector_bytes + 4] = b"changed"
        assert disk.read(8192, len(plain)) == expected
        assert disk.read(8192 + 511, 3) == expected[511:514]


@pytest.mark.parametrize(
    ("algorithm", "key", "plain", "encrypted"),
    [
        # RFC 2144, appendix B.1; the Twofish paper, appendix B.2; NESSIE's first vectors of Serpent.
        (CipherAlgorithm.CAST5, "0123456712345678234567893456789a", "0123456789abcdef", "238b4fe5847e44b2"),
        (CipherAlgorithm.TWOFISH, "00" * 16, "00" * 16, "9f589f5cf6122c32b6bfec2f2ae8c35a"),
        (CipherAlgorithm.TWOFISH, "00" * 24, "00" * 16, "efa71f788965bd4453f860178fc19101"),
        (CipherAlgorithm.TWOFISH, "00" * 32, "00" * 16, "57ff739d4dc92c1bd7fc01700cc8216f"),
        (CipherAlgorithm.SERPENT, "80" + "00" * 15, "00" * 16, "264e5481eff42a4606abda06c0bfda3d"),
        (CipherAlgorithm.SERPENT, "80" + "00" * 31, "00" * 16, "a223aa1288463c0e2be38ebd825616c0"),
    ],
)
def test_the_published_vectors_of_the_other_ciphers(
    algorithm: CipherAlgorithm, key: str, plain: str, encrypted: str
) -> None:
    cipher = Cipher(algorithm, CipherMode.ECB, len(key) // 2, InitialVector.NONE)
    sector_of = bytes.fromhex(plain) * (1024 // len(plain))
    by_engine = EngineCryptography(None).encrypt(cipher, bytes.fromhex(key), sector_of)
    assert by_engine[: len(plain) // 2].hex() == encrypted
    assert EngineCryptography(None).decrypt(cipher, bytes.fromhex(key), by_engine) == sector_of


def test_a_number_of_more_than_32_bits_is_cut_by_plain(tmp_path: Path) -> None:
    numbers = {}
    for iv in (InitialVector.PLAIN, InitialVector.PLAIN64):
        cipher = Cipher(AES, XTS, 64, iv, iv_offset=-((5 << 32) + 3) * 512)
        path = host(tmp_path, iv.name, bytes(512))
        with Disk() as disk:
            add(disk, path, Geometry(512, 512, 512, identity=Identity(), cipher=cipher), bytes(range(64)))
            disk.put(bytes(512), 0)
        numbers[iv] = path.read_bytes()
    assert numbers[InitialVector.PLAIN] == xts_sector(bytes(range(64)), 3, bytes(512))
    assert numbers[InitialVector.PLAIN64] == xts_sector(bytes(range(64)), (5 << 32) + 3, bytes(512))


def test_the_published_vector_of_xts() -> None:
    """IEEE 1619-2007, appendix B, vector 4 begins so (keys 27182818…, 31415926…, sector 0)."""
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    plain = bytes(range(256)) * 2
    expected = bytes.fromhex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c")
    assert xts_sector(key, 0, plain)[:32] == expected
    with Disk() as disk:
        path = Path("/dev/shm") / f"tapfs-xts-{os.getpid()}"  # noqa: S108
        path.write_bytes(xts_sector(key, 0, plain))
        try:
            add(disk, path, Geometry(512, 512, 512, identity=Identity(), cipher=Cipher(AES, XTS, 32)), key)
            assert disk.read(0, 512) == plain
        finally:
            path.unlink()


@pytest.mark.parametrize("from_host", [False, True])
def test_the_iv_counts_guest_or_host_offsets(tmp_path: Path, *, from_host: bool) -> None:
    """Qcow counts the guest's, LUKS inside qcow2 the host's; a payload behind a header begins at zero again."""
    key = bytes(range(32))
    cipher = Cipher(AES, CBC, 32, iv_from_host=from_host, iv_offset=4096 if from_host else 0)
    plain = os.urandom(512)
    with Disk() as disk:
        path = host(tmp_path, "a", bytes(SIZE))
        add(disk, path, Geometry(SIZE, 4096, SIZE, cipher=cipher), key)
        placed = Extent(8192, 4096, Kind.DATA, host_offset=20480, in_place=True)
        disk.install(0, [Extent(0, 8192, Kind.ZERO), placed, Extent(12288, SIZE - 12288, Kind.ZERO)])
        disk.put(plain, 8192)
        number = (20480 - 4096) // 512 if from_host else 8192 // 512
        assert path.read_bytes()[20480:20992] == sector(cipher, key, number, plain)
        assert disk.read(8192, 512) == plain


def test_one_extent_may_be_the_whole_disk_anywhere(tmp_path: Path) -> None:
    """An identity with a shift in a second file: a payload behind a header needs no map."""
    with Disk() as disk:
        paths = [host(tmp_path, "head", b"h" * 512), host(tmp_path, "data", b"#" * 4096 + bytes(SIZE))]
        files: list[HostDescriptor] = []
        for path in paths:
            descriptor = open_host(path, direct=False)
            disk.descriptors.append(descriptor)
            files.append(HostDescriptor(descriptor, str(path), writable=True))
        disk.add_layer(Geometry(SIZE, 1, 1 << 20, identity=Identity(1, 4096)), files=files, writable=True)
        disk.put(b"first", 0)
        disk.put(b"last", SIZE - 4)
        assert disk.read(0, 5) + disk.read(SIZE - 4, 4) == b"firstlast"
        assert paths[0].read_bytes() == b"h" * 512
        content = paths[1].read_bytes()
        assert (content[:4096], content[4096:4101], content[-4:]) == (b"#" * 4096, b"first", b"last")


@pytest.mark.parametrize(
    "cipher",
    [
        Cipher(AES, CBC, 20),
        Cipher(AES, XTS, 16),
        Cipher(AES, XTS, 62),
        Cipher(AES, CBC, 16, InitialVector.NONE),
        Cipher(AES, CipherMode.ECB, 16),
        Cipher(AES, CBC, 16, InitialVector.ESSIV, "sha1"),  # gives no key of AES
        Cipher(AES, CBC, 16, InitialVector.ESSIV, "unknown"),
        Cipher(CipherAlgorithm.CAST5, XTS, 32),  # its blocks are too short
        Cipher(CipherAlgorithm.TWOFISH, CBC, 20),
        Cipher(AES, CBC, 16, sector_bytes=256),
        Cipher(AES, CBC, 16, sector_bytes=8192),
        Cipher(AES, CBC, 16, sector_bytes=1536),
        Cipher(AES, CBC, 16, iv_bytes=0),
        Cipher(AES, CBC, 16, iv_offset=100),
        Cipher(AES, CBC, 16, sector_bytes=4096),  # more than a granule
    ],
)
def test_a_cipher_that_cannot_be_is_refused(tmp_path: Path, cipher: Cipher) -> None:
    with Disk() as disk, pytest.raises(ImageError):
        add(disk, host(tmp_path, "a"), Geometry(SIZE, 512, SIZE, cipher=cipher), bytes(cipher.key_bytes))
