"""List the files that an image is for fsspec: its disk, partitions and snapshots (pip install 'tapfs[fsspec]').

usage: by_fsspec.py IMAGE
"""

import sys

import fsspec


def main(path: str) -> None:
    """Print names, sizes and first bytes."""
    files = fsspec.filesystem("tapfs", image=path)
    for name in files.find(""):
        print(f"{files.size(name):12} {name}  {files.cat_file(name, 0, 4).hex(' ')}")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
