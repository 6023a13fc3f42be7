"""Passwords of encrypted images, from where nobody need type them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Self

from tapfs.errors import ErrorKind, ImageError, from_os_error

#: The environment variable that may hold the password of an encrypted image.
PASSWORD_VARIABLE = "TAPFS_PASSWORD"  # noqa: S105  the name of a variable, not a password
#: Far more than any cipher uses; a key file that is really a disk must not be read whole.
_KEY_LIMIT = 64 << 10


class LayerPasswords(bytes):
    """Passwords of a chain whose images have different ones; wherever a password is taken, this may be given.

    As bytes it is the password of every image that has none of its own, b"" for none. `own` has the others by the names
    of the images' files.
    """

    own: Mapping[str, bytes]

    def __new__(cls, usual: bytes, own: Mapping[str, bytes]) -> Self:
        """A password for most images, and those of some."""
        made = super().__new__(cls, usual)
        made.own = {os.path.realpath(image): nonempty(each, f"the password of {image}") for image, each in own.items()}
        return made

    def of(self, paths: Sequence[str]) -> bytes:
        """The password of the first of these images, which lie over one another.

        It is its own one, or else the usual one. Where there is none, it is that of the nearest image below: so a
        scratch overlay is encrypted as the image is that it lies over.
        """
        found = [self.own.get(os.path.realpath(path)) for path in paths]
        if found[0] is not None:
            return found[0]
        return bytes(self) or next((each for each in found if each is not None), b"")


def password_of(password: bytes | None, paths: Sequence[str]) -> bytes:
    """The password of the first of these images, which lie over one another. Raises ImageError(denied) for none."""
    found = password.of(paths) if isinstance(password, LayerPasswords) else password
    if isinstance(password, LayerPasswords) and not found:
        raise password_missing(paths[0])
    return found or b""


def given_password(key_file: str | Sequence[str] | None) -> bytes | None:
    """The first line of the key file, else what the environment holds, else None. Raises ImageError.

    Of several the last one counts. Those of the form IMAGE=FILE are for one image each, unless there is such a file.
    """
    plain, own = None, dict[str, bytes]()
    for name in [key_file] if isinstance(key_file, str) else key_file or ():
        image, file = ("", name) if isinstance(key_file, str) else split_key_file(name)
        if image:
            own[image] = _first_line(file)
        else:
            plain = _first_line(file)
    if plain is None and PASSWORD_VARIABLE in os.environ:
        plain = nonempty(os.environb[PASSWORD_VARIABLE.encode()], PASSWORD_VARIABLE)
    return LayerPasswords(plain or b"", own) if own else plain


def split_key_file(name: str) -> tuple[str, str]:
    """The image of IMAGE=FILE and the key file; "" for the image of a FILE, whose name may have an equals sign."""
    image, equals, file = name.rpartition("=")
    return (image, file) if equals and image and not os.path.exists(name) else ("", name)


def absolute_key_file(name: str) -> str:
    """The same FILE or IMAGE=FILE for a process that works in another folder."""
    image, file = split_key_file(name)
    return f"{os.path.abspath(image)}={os.path.abspath(file)}" if image else os.path.abspath(file)


def _first_line(key_file: str) -> bytes:
    try:
        with open(key_file, "rb") as file:
            line = file.readline(_KEY_LIMIT)
    except OSError as error:
        raise from_os_error(error, path=key_file, op="read the key file") from error
    return nonempty(line.removesuffix(b"\n").removesuffix(b"\r"), f"the key file {key_file}")


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
