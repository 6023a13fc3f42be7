"""The signs of a package at the start of a file: an archive, or the descriptor of a virtual machine."""

from __future__ import annotations

#: Bytes of the start of a file that show whether it is a package.
HEAD_BYTES = 4096


def is_archive(head: bytes) -> bool:
    """Whether a file with this start is a tar archive of POSIX or GNU."""
    return head[257:262] == b"ustar"


def starts_with_descriptor(head: bytes) -> bool:
    """Whether a file with this start is an archive whose first member describes a virtual machine."""
    name = head[:100].partition(b"\0")[0].removeprefix(b"./").lower()
    return is_archive(head) and (name == b"ova.xml" or name.endswith(b".ovf"))


def descriptor_kind(head: bytes) -> str | None:
    """The kind of descriptor (ovf, vbox, vmx) that a file with this start is, None if it is none."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        if b"Envelope" in text and (b"dmtf.org/ovf/" in text or b"vmware.com/schema/ovf/" in text):
            return "ovf"
        return "vbox" if b"<VirtualBox" in text else None
    return "vmx" if _is_vmx(head) else None


def _is_vmx(head: bytes) -> bool:
    """Text with the keys that say the version of a .vmx."""
    if b"\0" in head or b"ersion" not in head:
        return False
    keys = {line.partition(b"=")[0].strip().lower() for line in head.splitlines() if b"=" in line}
    return b"config.version" in keys or b"virtualhw.version" in keys


def may_be_package(head: bytes) -> bool:
    """Whether a file with this start, of `HEAD_BYTES`, may be a package."""
    return is_archive(head) or descriptor_kind(head) is not None
