"""Objects of web servers and object stores, by the library obstore: HTTP, HTTPS, S3, Google and Azure.

Every answer says which object it is of (ETag, length, time), and that is compared with what the first one said. So a
file that is replaced while it is read becomes an error and never a mixture.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.address import Address
from tapfs.host.remote.source import Facts, has_changed

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_CONNECT_SECONDS = 10
_LISTING_SECONDS = 60


class ListedObject(NamedTuple):
    """An object of a store: its address, bytes, and what changes with its bytes."""

    address: str
    size: int
    identity: str | None


def objects_below(address: Address) -> list[ListedObject] | None:
    """The objects below an address of a store, by their names; None if the address is that of one object.

    Raises ImageError.
    """
    obstore = _library(address)
    bucket = f"{address.scheme}://{address.parts.netloc}"
    with _explained(str(address), "list"):
        store, key = _store_of(address, _LISTING_SECONDS)
        if key and not key.endswith("/"):
            with suppress(FileNotFoundError):
                obstore.head(store, key)
                return None
        found: list[ListedObject] = []
        for some in obstore.list(store, prefix=key or None):
            for meta in some:
                facts = _facts(meta)
                found.append(ListedObject(f"{bucket}/{quote(meta['path'])}", facts.size, facts.identity))
    return sorted(found)


def _library(address: Address) -> ModuleType:
    """The library. Raises ImageError(unsupported) where it is not installed."""
    try:
        import obstore
    except ImportError as error:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{address.scheme} addresses need the Python package obstore",
            path=str(address),
            op="open",
            remedy="install it: pip install 'tapfs[remote]'",
        ) from error
    return obstore


class ObjectSource:
    """One object of a web server or of a store: a `tapfs.host.remote.source.Source`."""

    def __init__(self, address: Address, *, timeout_seconds: float) -> None:
        """Ask for the first byte, which says whether the server gives parts of a file. Raises ImageError."""
        self._name = str(address)
        self._obstore = _library(address)
        with self._explained("open"):
            self._store, self._key = _store_of(address, timeout_seconds)
        self.facts = self._asked()

    def read(self, offset: int, length: int) -> memoryview:
        """See `tapfs.host.remote.source.Source.read`."""
        with self._explained("read", offset):
            answer = self._obstore.get(self._store, self._key, options={"range": (offset, offset + length)})
            meta, covered = answer.meta, answer.range
            data = memoryview(answer.bytes())
        if _facts(meta) != self.facts:
            raise has_changed(self._name)
        if covered != (offset, offset + length) or len(data) != length:
            message = f"the server sent {len(data)} bytes from {covered[0]}, not {length} from {offset}"
            raise ImageError(ErrorKind.IO, message, path=self._name, offset=offset, op="read")
        return data

    def close(self) -> None:
        """Nothing is held that outlives the process."""

    def _asked(self) -> Facts:
        try:
            with self._explained("open"):
                return _facts(self._obstore.get(self._store, self._key, options={"range": (0, 1)}).meta)
        except ImageError as error:
            if error.kind is not ErrorKind.IO:
                raise
            # Of an empty file no byte can be had; of other troubles the first error tells most.
            try:
                facts = _facts(self._obstore.head(self._store, self._key))
            except Exception:  # noqa: BLE001
                raise error from None
            if facts.size:
                raise
            return facts

    def _explained(self, op: str, offset: int | None = None) -> AbstractContextManager[None]:
        return _explained(self._name, op, offset)


@contextmanager
def _explained(name: str, op: str, offset: int | None = None) -> Generator[None]:
    """Make ImageErrors of the library's errors."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        kind, message, remedy = what_failed(error, name.partition(":")[0])
        raise ImageError(kind, message, path=name, offset=offset, op=op, remedy=remedy) from error


def _store_of(address: Address, timeout_seconds: float) -> tuple[ObjectStore, str]:
    """The store that an address is in, and the object's key there."""
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    # Tries again are the fetching process's, so that all protocols have them alike.
    retry: RetryConfig = {"max_retries": 0}
    client: ClientConfig = {
        "timeout": timedelta(seconds=timeout_seconds),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        # Only who has written http:// in the address, or as the endpoint of a store, gets it.
        "allow_http": True,
    }
    parts = address.parts
    if address.scheme in {"http", "https"}:
        return HTTPStore.from_url(address.text, client_options=client, retry_config=retry), ""
    bucket, key = f"{address.scheme}://{parts.netloc}", unquote(parts.path.lstrip("/"))
    match address.scheme:
        case "s3":
            return S3Store.from_url(bucket, client_options=client, retry_config=retry), key
        case "gs":
            return GCSStore.from_url(bucket, client_options=client, retry_config=retry), key
        case _:
            return AzureStore.from_url(bucket, client_options=client, retry_config=retry), key


def _facts(meta: ObjectMeta) -> Facts:
    modified = int(meta["last_modified"].timestamp())
    identity = meta.get("e_tag") or (str(modified) if modified else None)
    return Facts(meta["size"], identity, modified, writable=False)


#: The address at which a machine of a cloud asks who it is, which the stores do where the environment has no keys.
_METADATA_SERVICE = "://169.254.169.254/"

#: Variables of the environment by which each store knows who asks.
_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true if it is public",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of an account, or GOOGLE_SKIP_SIGNATURE=true if it is public",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true if it is public",
}


def what_failed(error: Exception, scheme: str) -> tuple[ErrorKind, str, str | None]:
    """What an error of obstore means: its kind, its words, and the remedy."""
    from obstore import exceptions

    # What follows the first line is the library's own view of its objects.
    said = str(error).strip().partition("\n")[0].strip()
    match error:
        case FileNotFoundError():
            return ErrorKind.NOT_FOUND, "there is no such object", None
        case exceptions.PermissionDeniedError() | exceptions.UnauthenticatedError():
            return ErrorKind.DENIED, f"the server gives it to nobody without leave: {said}", None
        case _ if _METADATA_SERVICE in said:
            return (
                ErrorKind.DENIED,
                "the environment has no keys for it, and this is no machine of a cloud",
                _KEYS[scheme],
            )
        case _ if scheme == "az" and "Account must be specified" in said:
            return ErrorKind.DENIED, "the environment does not say which storage account it is in", _KEYS[scheme]
        case exceptions.NotSupportedError():
            return (
                ErrorKind.UNSUPPORTED,
                "the server gives no parts of a file (no range requests)",
                "download the file, or serve it by a server that has ranges",
            )
        case _:
            return ErrorKind.IO, f"the server or the way to it failed: {said}", None
