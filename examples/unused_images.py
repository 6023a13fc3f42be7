"""Name the images under a folder that no other image there needs, the largest on the host first.

usage: unused_images.py FOLDER
"""

import json
import subprocess
import sys


def main(folder: str) -> None:
    """Print bytes on the host, path, and how many images lie below it."""
    done = subprocess.run([sys.executable, "-m", "tapfs.cli", "survey", "--json", folder], stdout=subprocess.PIPE)
    images = json.loads(done.stdout)["images"]
    for image in sorted(images, key=lambda each: -(each["allocated_size"] or 0)):
        if not image["used_by"] and image["error"] is None:
            print(f"{image['allocated_size']:12} {image['path']} (over {len(image['chain']) - 1})")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
