"""TLS of the engine's NBD server as Python sees it: certificates and shared keys, and clients behind them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel._engine import ffi, lib

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

#: The longest key, in bytes, and the longest name of one.
KEY_MAX, IDENTITY_MAX = 64, 255

_WHY_BYTES = 256


class TlsServer:
    """The server's side of TLS 1.2 and 1.3, by OpenSSL. Raises MemoryError."""

    def __init__(self) -> None:
        tls = lib.tapfs_tls_new()
        if tls == ffi.NULL:
            raise MemoryError
        self._tls: CData | None = ffi.gc(tls, lib.tapfs_tls_free)

    @property
    def _handle(self) -> CData:
        if self._tls is None:
            raise ValueError("TLS is closed")
        return self._tls

    def use_certificate(self, certificate: str, key: str, authority: str | None) -> None:
        """Show clients a certificate. With an `authority` they must show one that it has signed.

        All are files in PEM. Raises ImageError(invalid_argument).
        """
        own, secret, other = (os.fsencode(name or "") for name in (certificate, key, authority))
        if lib.tapfs_tls_use_certificate(self._handle, own, secret, other, authority is not None) < 0:
            raise ImageError(
                ErrorKind.INVALID_ARGUMENT,
                f"these are no certificate and key that belong together: {self.why()}",
                path=certificate,
                op="read the certificates",
            )

    def add_key(self, identity: str, key: bytes) -> None:
        """Let in clients that have this key, of 1 to `KEY_MAX` bytes, under this name. Raises ValueError."""
        result = lib.tapfs_tls_add_key(self._handle, identity.encode(), key, len(key))
        if result < 0:
            raise ValueError(os.strerror(-result))

    def begin(self, descriptor: int) -> int:
        """Begin TLS with a client on its socket. The result is a socket on which what it says can be read and answered.

        Takes over the descriptor, unless it raises OSError.
        """
        result = lib.tapfs_tls_begin(self._handle, descriptor)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def why(self) -> str:
        """How the last handshake failed, once."""
        text = ffi.new("char[]", _WHY_BYTES)
        lib.tapfs_tls_why(self._handle, text, _WHY_BYTES)
        return ffi.string(text).decode(errors="replace")

    def close(self) -> None:
        """End what is left of the connections: clients have two seconds to take what was said."""
        if self._tls is not None:
            ffi.release(self._tls)
            self._tls = None
