"""The methods of a storage provider: `io.systemd.StorageProvider` over the images of a folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import Any, TypeVar

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.volumes.images import Volumes, is_name, templates
from tapfs.volumes.interface import DESCRIPTIONS, PROVIDER, SERVICE
from tapfs.volumes.varlink import Call, Reply, VarlinkError

#: Names that the interface has for errors.
_NAMES = {
    ErrorKind.NOT_FOUND: "NoSuchVolume",
    ErrorKind.EXISTS: "VolumeExists",
    ErrorKind.READ_ONLY: "ReadOnlyVolume",
}
#: Errors that a volume which cannot be written gives, where reading would do.
_NOT_WRITABLE = (ErrorKind.READ_ONLY, ErrorKind.DENIED, ErrorKind.UNSUPPORTED)
_TYPES = ("blk", "reg", "dir")
_MODES = ("any", "new", "open")

_Value = TypeVar("_Value", str, int, bool)


class StorageProvider:
    """Answers calls of both interfaces."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    def __call__(self, call: Call) -> Iterator[Reply]:
        """The replies to a call. Raises VarlinkError."""
        methods = {
            f"{SERVICE}.GetInfo": self._info,
            f"{SERVICE}.GetInterfaceDescription": self._description,
            f"{PROVIDER}.Acquire": self._acquire,
            f"{PROVIDER}.ListVolumes": self._list_volumes,
            f"{PROVIDER}.ListTemplates": self._list_templates,
        }
        if call.method not in methods:
            interface = call.method.rpartition(".")[0]
            if interface in DESCRIPTIONS:
                raise VarlinkError(f"{SERVICE}.MethodNotFound", method=call.method)
            raise VarlinkError(f"{SERVICE}.InterfaceNotFound", interface=interface)
        try:
            yield from methods[call.method](call)
        except ImageError as error:
            log.error("%s", error)
            raise _told(error) from error

    def _info(self, call: Call) -> Iterator[Reply]:
        del call
        about = {"vendor": "tapfs", "product": "tapfs volumes of images", "version": version("tapfs"), "url": ""}
        yield Reply(about | {"interfaces": [SERVICE, PROVIDER]})

    def _description(self, call: Call) -> Iterator[Reply]:
        name = _given(call.parameters, "interface", str)
        if name is None:
            raise VarlinkError(f"{SERVICE}.InvalidParameter", parameter="interface")
        if name not in DESCRIPTIONS:
            raise VarlinkError(f"{SERVICE}.InterfaceNotFound", interface=name)
        yield Reply({"description": DESCRIPTIONS[name]})

    def _list_volumes(self, call: Call) -> Iterator[Reply]:
        wanted = _pattern(call)
        none = True
        for volume in self._volumes.all():
            if wanted is None or fnmatchcase(volume.name, wanted):
                none = False
                sizes = {"sizeBytes": volume.size, "usedBytes": volume.used}
                told = {key: value for key, value in sizes.items() if value is not None}
                yield Reply({"name": volume.name, "type": "reg", "readOnly": not volume.writable} | told)
        if none:
            raise VarlinkError(f"{PROVIDER}.NoSuchVolume")

    def _list_templates(self, call: Call) -> Iterator[Reply]:
        wanted = _pattern(call)
        found = [name for name in templates() if wanted is None or fnmatchcase(name, wanted)]
        if not found:
            raise VarlinkError(f"{PROVIDER}.NoSuchTemplate")
        for name in found:
            yield Reply({"name": name, "type": "reg"})

    def _acquire(self, call: Call) -> Iterator[Reply]:
        name = _given(call.parameters, "name", str)
        mode = _given(call.parameters, "createMode", str) or "any"
        read_only = _given(call.parameters, "readOnly", bool)
        wanted = _given(call.parameters, "requestAs", str) or "reg"
        for key, value, known in (("createMode", mode, _MODES), ("requestAs", wanted, _TYPES)):
            if value not in known:
                raise VarlinkError(f"{SERVICE}.InvalidParameter", parameter=key)
        if name is None or not is_name(name):
            raise VarlinkError(f"{SERVICE}.InvalidParameter", parameter="name")
        if wanted != "reg":
            raise VarlinkError(f"{PROVIDER}.WrongType")
        if mode != "open":
            self._create(call, name, only=mode == "new")
        descriptor, read_only = self._open(name, read_only=read_only)
        yield Reply({"fileDescriptorIndex": 0, "type": "reg", "readOnly": read_only}, [descriptor])

    def _create(self, call: Call, name: str, *, only: bool) -> None:
        """Make the volume, unless it exists; `only`: that is an error."""
        if self._volumes.exists(name):
            if only:
                raise VarlinkError(f"{PROVIDER}.VolumeExists")
            return
        template = _given(call.parameters, "template", str)
        if template is not None and template not in templates():
            raise VarlinkError(f"{PROVIDER}.NoSuchTemplate")
        size = _given(call.parameters, "createSizeBytes", int)
        if size is None:
            raise VarlinkError(f"{PROVIDER}.CreateSizeRequired")
        self._volumes.create(name, template, size)

    def _open(self, name: str, *, read_only: bool | None) -> tuple[int, bool]:
        """The volume's descriptor, and whether it can only be read. None: it is written if that can be."""
        if read_only is None:
            try:
                return self._volumes.open(name, writable=True), False
            except ImageError as error:
                if error.kind not in _NOT_WRITABLE:
                    raise
                read_only = True
        return self._volumes.open(name, writable=not read_only), read_only


def _pattern(call: Call) -> str | None:
    """The names that are wanted. Raises VarlinkError unless several replies are taken."""
    if not call.more:
        raise VarlinkError(f"{SERVICE}.ExpectedMore")
    return _given(call.parameters, "matchName", str)


def _given(parameters: dict[str, Any], name: str, kind: type[_Value]) -> _Value | None:
    """A parameter, if it is there. Raises VarlinkError."""
    value = parameters.get(name)
    if value is None or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise VarlinkError(f"{SERVICE}.InvalidParameter", parameter=name)


def _told(error: ImageError) -> VarlinkError:
    """The error that a client knows. What no name stands for is an errno, as systemd tells it."""
    name = _NAMES.get(error.kind)
    if name is not None:
        return VarlinkError(f"{PROVIDER}.{name}")
    number = error.errno or errno.EIO
    named = {"errno": number, "origin": "linux", "errnoName": errno.errorcode.get(number, "EIO")}
    return VarlinkError("io.systemd.System", **named)
