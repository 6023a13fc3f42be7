"""LUKS, versions 1 and 2: an encrypted disk behind a header with key slots, as cryptsetup and QEMU have it.

:data:`FORMAT` is the object that the registry loads. docs/specs/luks.md says what the two specifications leave out.
Modules that a probe does not need are imported late.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tapfs.driver import Ability, CreateRequest, HostFile, OpenRequest, Trait
from tapfs.errors import ErrorKind, ImageError
from tapfs.plan import Grow, Plan, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.luks.driver import LuksDriver


class LuksFormat:
    """LUKS as a :class:`tapfs.driver.CreatableFormat`."""

    name = "luks"
    abilities = frozenset({Ability.WRITE, Ability.ENCRYPT, Ability.RESIZE})
    traits = frozenset({Trait.ALWAYS_ENCRYPTED})

    def probe(self, head: bytes, size: int) -> int:
        """0: a guest that encrypts its whole disk writes the same. So somebody has to say what is meant."""
        del head, size
        return 0

    def open(self, file: HostFile, request: OpenRequest) -> LuksDriver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, corrupt) naming the field."""
        from tapfs.formats.luks.driver import LuksDriver

        return LuksDriver(file, request.grown_size)

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.luks.options import LUKS_OPTIONS

        return {**LUKS_OPTIONS, "preallocation": "off (default); falloc: the host reserves the space; or full"}

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new container of version 1. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.luks.create import make_header, parse_luks_options
        from tapfs.formats.preallocation import FALLOC, FULL, preallocation_of, space_stages

        known_options = self.create_options
        for option in request.options:
            if option not in known_options:
                message, known = f"unknown option {option!r} for luks", f"the options are {', '.join(known_options)}"
                raise ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=known)
        if request.backing is not None:
            raise ImageError(ErrorKind.UNSUPPORTED, "a LUKS container has no backing file", op="create")
        if request.virtual_size < 0 or request.virtual_size % 512:
            message = f"a LUKS container has whole sectors of 512 bytes, and {request.virtual_size} bytes are none"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create")
        mode = preallocation_of(request.options, FALLOC, FULL)
        options = parse_luks_options(request.options)
        head = make_header(options, *request.secret())
        whole = options.payload_offset + request.virtual_size
        space = space_stages(mode, 0, options.payload_offset, request.virtual_size)
        return plan([Grow(0, whole)], *space, [Write(0, 512, head[512:])], [Write(0, 0, head[:512])])


FORMAT = LuksFormat()
