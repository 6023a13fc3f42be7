"""The signatures of Parallels images and bundles: all that a probe of a file needs, so that it loads no more."""

from __future__ import annotations

OLD_MAGIC, MAGIC = b"WithoutFreeSpace", b"WithouFreSpacExt"

#: The element that the descriptor of a bundle begins with stands behind the declaration of XML.
_BUNDLE_SIGN = b"<Parallels_disk_image"
BUNDLE_SIGN_WITHIN = 512


def is_bundle(head: bytes) -> bool:
    """Whether a file with this start is the descriptor of a bundle."""
    return _BUNDLE_SIGN in head[:BUNDLE_SIGN_WITHIN]
