"""List what is on the disk of an image, and how each partition begins.

usage: partitions.py IMAGE
"""

import sys

import tapfs


def main(path: str) -> None:
    """Print the table."""
    info = tapfs.info(path)
    print(f"{info['format']}, {info['virtual_size']} bytes")
    for partition in info.get("partitions", {}).get("table", ()):
        if partition["container"]:
            continue
        found = partition["file_system"]
        with tapfs.open_file(path, partition=partition["number"]) as file:
            start = file.read(8)
        print(
            f"{partition['number']}: {partition['size']} bytes, {found and found['type']}, begins with {start.hex(' ')}"
        )


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
