"""Install what building tapfs and mounting need into this interpreter's environment.

usage: install_requirements.py PYPROJECT [GROUP ...]: the dependency groups instead of that (dev, bench).

The lists are those of pyproject.toml; pip before 25.1 cannot read its dependency groups.
"""

import subprocess
import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Install the build requirements and the dependencies, or the groups."""
    settings = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    project = settings["project"]
    groups = settings["dependency-groups"]
    if len(sys.argv) > 2:
        wanted = [requirement for group in sys.argv[2:] for requirement in groups[group]]
        return subprocess.call([sys.executable, "-m", "pip", "install", "-q", *wanted])
    wanted = [
        *settings["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["fuse"],
        "wheel",
    ]
    return subprocess.call([sys.executable, "-m", "pip", "install", "-q", *wanted])


if __name__ == "__main__":
    sys.exit(main())
