"""Another user of this machine, who puts files and links where everybody may."""

from __future__ import annotations

import subprocess

#: "nobody": has no files of its own anywhere.
OTHER_USER = 65534


def as_other_user(script: str, *words: object) -> None:
    """Run a shell script as the other user; `words` are its arguments."""
    subprocess.run(
        ["sh", "-ec", script, "sh", *map(str, words)], check=True, user=OTHER_USER, group=OTHER_USER, extra_groups=[]
    )
