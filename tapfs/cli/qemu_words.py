"""Options of qemu-img that scripts bring along: tapfs obeys them, needs them not, or says what it has instead."""

from __future__ import annotations

import argparse

#: The cache modes of QEMU; with those of `_DIRECT` the page cache of the host is bypassed.
CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")
_DIRECT = ("none", "directsync")

_INSTEAD = {
    "--image-opts": "images are named by file names here; --backing, --key-file, --snapshot and --direct say the rest",
    "--target-image-opts": "the target is named by a file name here",
    "--object": "secrets come from --key-file or $TAPFS_PASSWORD here",
}


def add_qemu_words(parser: argparse.ArgumentParser, *caches: str, target_options: bool = False) -> None:
    """Add the words of qemu-img: the letters of cache modes, and what is refused with a word about what to say instead.

    `caches`: "-t" or "-T", as ``cache_t`` and ``cache_T`` in what is parsed.
    """
    group = parser.add_argument_group("options of qemu-img, for scripts that have them")
    for letter in caches:
        group.add_argument(
            letter,
            dest=f"cache_{letter[1:]}",
            metavar="MODE",
            choices=CACHE_MODES,
            help=f"cache mode ({', '.join(CACHE_MODES)}): none and directsync are --direct; whatever is written is"
            " durable at the end with any mode"
            if letter == caches[0]
            else "the same for the other image",
        )
    refused = ["--image-opts", "--object", *(["--target-image-opts"] if target_options else [])]
    for word in refused:
        group.add_argument(
            word,
            action=_Refused,
            nargs=None if word == "--object" else 0,
            help=f"refused: {_INSTEAD[word]}",
        )


def is_direct(mode: str | None) -> bool:
    """Whether a cache mode bypasses the page cache of the host."""
    return mode in _DIRECT


class _Refused(argparse.Action):
    """Say what tapfs has instead of an option."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        del namespace, values
        word = option_string or ""
        parser.error(f"{word} is not taken: {_INSTEAD[word]}")
