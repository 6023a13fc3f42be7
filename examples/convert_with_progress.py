"""Convert an image to compressed qcow2, with progress, at most 200 MiB a second.

usage: convert_with_progress.py SOURCE TARGET
"""

import sys

import tapfs


def main(source: str, target: str) -> int:
    """Convert; 0, or 1 with a message."""

    def show(done: int, total: int) -> None:
        print(f"\r{done / max(total, 1):4.0%}", end="", file=sys.stderr)

    try:
        tapfs.convert(
            source,
            target,
            target_format="qcow2",
            compressed=True,
            copying=tapfs.CopyOptions(rate=200 << 20),
            progress=show,
        )
    except tapfs.ImageError as error:
        if error.kind is tapfs.ErrorKind.LOCKED:
            print("somebody uses it: try again later", file=sys.stderr)
        else:
            print(error, file=sys.stderr)
        return 1
    print(f"\n{target}: {tapfs.info(target)['allocated_size']} bytes on the host")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 3 else __doc__)
