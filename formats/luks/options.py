"""The names of the options of a new LUKS container, alone, because qcow2 lists them and seldom makes one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Of each the name after qemu-img; in front of it stands "encrypt." where the container lies inside another image.
LUKS_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "cipher-alg": "aes-256 (default), aes-128, aes-192, serpent-N, twofish-N (N: 128, 192, 256), cast5-128",
        "cipher-mode": "xts (default), cbc, ctr or ecb",
        "ivgen-alg": "plain64 (default), plain or essiv",
        "ivgen-hash-alg": "the digest of essiv (default sha256)",
        "hash-alg": "the digest of key derivation: sha256 (default), sha1, sha512, ripemd160, …",
        "iter-time": "milliseconds that a password takes to be tried (default 2000)",
    }
)
