"""Encryption of qcow2 images: the old way (crypt_method 1), and LUKS (2), whose header lies inside the image.

A LUKS header has clusters of its own, which the header extension of encryption names. Its own offsets count from there.
IVs count the sectors of the host file (docs/specs/qcow2.md, "Encryption").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapfs.driver import Cipher, CipherAlgorithm, CipherMode, Cryptography, HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.header import CRYPT_AES, CRYPT_METHOD_AT, CRYPT_NONE, WORD, Header
from tapfs.records import NamedTuple, replace

if TYPE_CHECKING:
    from tapfs.formats.luks.volume import Volume

#: AES-128 in CBC mode, the IV is the number of the guest's sector.
_KEY_BYTES = 16
_OLD_CIPHER = Cipher(CipherAlgorithm.AES, CipherMode.CBC, _KEY_BYTES)


class OldEncryption:
    """crypt_method 1: the password is the key."""

    name = "aes"
    proves_password = False
    cipher = _OLD_CIPHER
    place: Place | None = None
    details: dict[str, object] | None = None

    def unlock(self, password: bytes, cryptography: Cryptography) -> bytearray:
        """The first 16 bytes of the password, with zeros behind a shorter one. Nothing tells a wrong password."""
        del cryptography  # nothing is derived
        return bytearray(password[:_KEY_BYTES].ljust(_KEY_BYTES, b"\0"))


class Place(NamedTuple):
    """``[start, stop)`` of the file: the clusters of the LUKS header."""

    start: int
    stop: int


class LuksEncryption:
    """crypt_method 2: a LUKS1 header inside the image."""

    name = "luks"
    proves_password = True

    def __init__(self, file: HostFile, place: Place) -> None:
        from tapfs.formats.luks.version1 import read_version1  # and digests, which few images need

        self.place: Place | None = place
        self._file = file
        self._start, self._stop = place
        self._volume: Volume = read_version1(self._read, file.path, place.start)
        self.cipher = replace(self._volume.cipher, iv_from_host=True)
        self.details: dict[str, object] | None = {
            name: self._volume.details[name] for name in ("uuid", "cipher", "key_bits", "slots")
        }

    def unlock(self, password: bytes, cryptography: Cryptography) -> bytearray:
        """The key of the image; see :func:`tapfs.formats.luks.volume.unlock`."""
        from tapfs.formats.luks.volume import unlock

        return unlock(self._volume, self._read, password, cryptography, self._file.path)

    def _read(self, offset: int, length: int) -> bytes:
        start = self._start + offset
        return self._file.read(start, max(0, min(length, self._stop - start)))


Encryption = OldEncryption | LuksEncryption


def read_encryption(file: HostFile, header: Header, extensions: Sequence[ext.Extension]) -> Encryption | None:
    """The encryption of an image, None where there is none. Raises ImageError(corrupt, unsupported, invalid_format)."""
    if header.crypt_method == CRYPT_NONE:
        return None
    if header.crypt_method == CRYPT_AES:
        return OldEncryption()
    data = ext.data_of(extensions, ext.CRYPTO_HEADER)
    if data is None or len(data) != 2 * WORD:
        message = "is encrypted with LUKS, and no header extension says where the LUKS header is"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=CRYPT_METHOD_AT, op="open")
    start, length = (int.from_bytes(data[at : at + WORD], "big") for at in (0, WORD))
    if start < header.cluster_size or start % header.cluster_size or start + length > file.size():
        message = f"the LUKS header [{start:#x}, {start + length:#x}) cannot be there"
        offset = next(each.offset for each in reversed(extensions) if each.type == ext.CRYPTO_HEADER)
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=offset, op="open")
    return LuksEncryption(file, Place(start, start + length))
