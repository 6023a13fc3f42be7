"""Convert an image that is in a ZIP archive, without unpacking it first: only what the disk has is read.

usage: image_in_a_zip.py ARCHIVE MEMBER TARGET
"""

import sys
import zipfile

import tapfs


def main(archive: str, member: str, target: str) -> None:
    """Write the disk into a new qcow2 image."""
    with zipfile.ZipFile(archive) as packed, packed.open(member) as file, tapfs.open(file) as disk:
        print(f"{member}: {disk.format_name}, {disk.size} bytes")
        tapfs.convert(disk, target, target_format="qcow2")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
