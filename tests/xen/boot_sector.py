"""A boot sector by bytes: what SeaBIOS reads and starts, and what proves that an emulated disk can be read and written.

It reads the next sector of its disk by the BIOS, sends the text that stands there over the first serial port, and
writes the sector to the third place behind it.
"""

from __future__ import annotations

SECTOR = 512
#: Where the text stands, and where the boot sector writes it.
TEXT_SECTOR, COPY_SECTOR = 1, 3

_AT, _BUFFER, _SERIAL = 0x7C00, 0x7E00, 0x3F8


def _word(number: int) -> bytes:
    return number.to_bytes(2, "little")


def _transfer(operation: int, sector: int) -> bytes:
    """One sector of cylinder 0 and head 0 between the boot disk and the buffer (int 13h)."""
    return b"".join(
        (
            b"\xb8" + _word(operation << 8 | 1),  # mov ax, operation and one sector
            b"\xbb" + _word(_BUFFER),  # mov bx, buffer
            b"\xb9" + _word(sector + 1),  # mov cx: sectors count from 1
            b"\xb6\x00",  # mov dh, 0
            b"\xcd\x13",  # int 13h
        )
    )


def bootable(size: int, text: str) -> bytes:
    """A disk of `size` bytes that boots and says `text`."""
    code = b"".join(
        (
            b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0",  # xor ax, ax; mov ds, es and ss, ax
            b"\xbc" + _word(_AT),  # mov sp
            _transfer(2, TEXT_SECTOR),
            b"\x52",  # push dx: dl is the disk
            b"\xbe" + _word(_BUFFER),  # mov si, buffer
            b"\xba" + _word(_SERIAL),  # mov dx, port
            b"\xac\x84\xc0\x74\x03",  # lodsb; test al, al; jz past the next two
            b"\xee\xeb\xf8",  # out dx, al; jmp to lodsb
            b"\x5a",  # pop dx
            _transfer(3, COPY_SECTOR),
            b"\xf4\xeb\xfd",  # hlt; jmp to hlt
        )
    )
    disk = bytearray(size)
    disk[: len(code)] = code
    disk[SECTOR - 2 : SECTOR] = b"\x55\xaa"
    encoded = text.encode()
    disk[TEXT_SECTOR * SECTOR : TEXT_SECTOR * SECTOR + len(encoded)] = encoded
    return bytes(disk)
