"""The keys and certificates of an NBD server, in the files that QEMU, nbdkit and libnbd use, too."""

from __future__ import annotations

import os
from pathlib import Path

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.kernel.nbd_tls import IDENTITY_MAX, KEY_MAX, TlsServer

#: In the directory of certificates: the server's own, its key, and the authority that signs those of clients.
_CERTIFICATE, _KEY, _AUTHORITY = "server-cert.pem", "server-key.pem", "ca-cert.pem"

#: A file of shared keys is not longer than this, in bytes.
_KEYS_BYTES = 1 << 20


def tls_server(*, certificates: str | None, keys: str | None, verify_clients: bool) -> TlsServer:
    """TLS with certificates from a directory, with shared keys from a file, or with both.

    `verify_clients`: a client needs a certificate of the same authority. Raises ImageError.
    """
    tls = TlsServer()
    if certificates is not None:
        paths = [os.path.join(certificates, name) for name in (_CERTIFICATE, _KEY, _AUTHORITY)]
        for path in paths if verify_clients else paths[:2]:
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise from_os_error(error, path=path, op="read the certificates") from error
        tls.use_certificate(paths[0], paths[1], paths[2] if verify_clients else None)
    if keys is not None:
        _add_keys(tls, keys)
    return tls


def _add_keys(tls: TlsServer, path: str) -> None:
    """Read lines ``NAME:KEY``, the key in hexadecimal digits, as psktool writes them."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(_KEYS_BYTES + 1)
    except OSError as error:
        raise from_os_error(error, path=path, op="read the keys") from error
    lines = text.decode(errors="replace").splitlines() if len(text) <= _KEYS_BYTES else []
    found = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, digits = line.strip().rpartition(":")
        try:
            key = bytes.fromhex(digits)
            if not name or len(name.encode()) > IDENTITY_MAX or not 0 < len(key) <= KEY_MAX:
                raise ValueError
            tls.add_key(name, key)
        except ValueError:
            # The line itself is a secret.
            raise _wrong(path, f"line {number} is no NAME:KEY with a key of 1 to {KEY_MAX} bytes in hex") from None
        found += 1
    if not found:
        raise _wrong(path, "has no key")


def _wrong(path: str, message: str) -> ImageError:
    return ImageError(
        ErrorKind.INVALID_ARGUMENT, message, path=path, op="read the keys", remedy="psktool of GnuTLS makes such a file"
    )
