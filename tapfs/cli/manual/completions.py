"""The completions of bash, zsh and fish, by the names of their files."""

from __future__ import annotations

from tapfs.cli.manual import bash, fish, zsh
from tapfs.cli.manual.known_words import known_words


def completion_files() -> dict[str, str]:
    """The scripts by the names that their shells look for below /usr/share."""
    known = known_words()
    return {
        "bash-completion/completions/tapfs": bash.script(known),
        "zsh/site-functions/_tapfs": zsh.script(known),
        "fish/vendor_completions.d/tapfs.fish": fish.script(known),
    }
