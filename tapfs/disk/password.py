"""Passwords of encrypted images, from where nobody need type them."""

from __future__ import annotations

import os

from tapfs.errors import ErrorKind, ImageError, from_os_error

#: The environment variable that may hold the password of an encrypted image.
PASSWORD_VARIABLE = "TAPFS_PASSWORD"  # noqa: S105  the name of a variable, not a password
#: Far more than any cipher uses; a key file that is really a disk must not be read whole.
_KEY_LIMIT = 64 << 10


def given_password(key_file: str | None) -> bytes | None:
    """The first line of the key file, else what the environment holds, else None. Raises ImageError."""
    if key_file is not None:
        try:
            with open(key_file, "rb") as file:
                line = file.readline(_KEY_LIMIT)
        except OSError as error:
            raise from_os_error(error, path=key_file, op="read the key file") from error
        return nonempty(line.removesuffix(b"\n").removesuffix(b"\r"), f"the key file {key_file}")
    password = os.environb.get(PASSWORD_VARIABLE.encode())
    return None if password is None else nonempty(password, PASSWORD_VARIABLE)


def nonempty(password: bytes, where: str) -> bytes:
    """The password, if there is one. Raises ImageError(denied)."""
    if not password:
        raise ImageError(ErrorKind.DENIED, f"{where} is empty", op="unlock")
    return password


def require_bytes(password: object) -> None:
    """Raise TypeError for a password that is text: which bytes it stands for is not for us to guess."""
    if password is not None and not isinstance(password, bytes):
        raise TypeError(f"a password is bytes, not {type(password).__name__}; encode it")


def password_missing(path: str) -> ImageError:
    """The error (denied, op "unlock") for an encrypted image without its password."""
    return ImageError(
        ErrorKind.DENIED,
        "is encrypted and no password was given",
        path=path,
        op="unlock",
        remedy="give it with {password}",
    )
