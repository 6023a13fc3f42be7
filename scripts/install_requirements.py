"""Install what building, testing and mounting need into this interpreter's environment.

The lists are those of pyproject.toml; pip before 25.1 cannot read its dependency groups.
"""

import subprocess
import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Install the union of the build requirements, the dependencies and the dev group."""
    settings = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    project = settings["project"]
    wanted = [
        *settings["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["fuse"],
        *settings["dependency-groups"]["dev"],
        "wheel",
    ]
    return subprocess.call([sys.executable, "-m", "pip", "install", "-q", *wanted])


if __name__ == "__main__":
    sys.exit(main())
