"""The completions, each in its real shell: what a person types, and what the shell makes of it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapfs.cli.manual import bash, zsh
from tapfs.cli.manual.__main__ import write_all
from tapfs.cli.manual.option_values import values_of

_SHOW = "\x18\x10"
#: For a shell that hangs; nothing is measured.
_PATIENCE_SECONDS = 60.0

#: The start of a file with the script, and the key that shows the line.
_RC = {
    "bash": """\
PS1= ; source {share}/bash-completion/completions/tapfs
show() {{ printf '<%s>' "$READLINE_LINE"; READLINE_LINE= ; READLINE_POINT=0; }}
bind -x '"\\C-x\\C-p": show' ; bind 'set bell-style none'
""",
    "zsh": """\
PS1= ; fpath=({share}/zsh/site-functions $fpath); autoload -U compinit; compinit -u -D
show() {{ print -rn -- "<$BUFFER>"; BUFFER= ; }}
zle -N show; bindkey '^X^P' show
""",
}


class Shell:
    """A shell at a terminal of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        rc = folder / (".zshrc" if name == "zsh" else "rc")
        rc.write_text(_RC[name].format(share=folder / "share"))
        words = ["bash", "--noprofile", "--rcfile", str(rc), "-i"] if name == "bash" else ["zsh", "-d", "-i"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "TERM": "dumb", "ZDOTDIR": str(folder), "HOME": str(folder), "LC_ALL": "C.UTF-8"}
        self._terminal, inner = pty.openpty()
        self._process = subprocess.Popen(
            words, stdin=inner, stdout=inner, stderr=inner, cwd=folder, env=environment, start_new_session=True
        )
        os.close(inner)

    def completed(self, typed: str) -> str:
        """The line after `typed` and the key TAB."""
        os.write(self._terminal, f"{typed}\t{_SHOW}".encode())
        seen = ""
        while ">" not in seen.partition("<")[2]:
            assert select.select([self._terminal], [], [], _PATIENCE_SECONDS)[0], f"the shell hangs after {seen!r}"
            seen += os.read(self._terminal, 4096).decode(errors="replace")
        return seen.partition("<")[2].partition(">")[0]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the completions, an image with a snapshot, and a name that is hard to type."""
    folder = tmp_path_factory.mktemp("completions")
    write_all(folder / "share", version="0")
    tool = [sys.executable, "-m", "tapfs.cli"]
    for words in (["create", "-f", "qcow2", "kept.qcow2", "1M"], ["snapshot", "-c", "monday", "kept.qcow2"]):
        subprocess.run([*tool, *words], cwd=folder, check=True)
    (folder / "a disk.raw").write_bytes(bytes(512))
    (folder / "images").mkdir()
    return folder


@pytest.fixture(params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, folder: Path) -> Iterator[Shell]:
    shell = Shell(request.param, folder)
    yield shell
    shell.end()


#: What is typed, and what stands there after TAB.
TYPED = {
    "tapfs conv": "tapfs convert ",
    "tapfs convert --force-s": "tapfs convert --force-share",
    "tapfs info kep": "tapfs info kept.qcow2 ",
    "tapfs info a": "tapfs info a\\ disk.raw ",
    "tapfs convert -O qcow2 -o compr": "tapfs convert -O qcow2 -o compression_type=",
    "tapfs convert -O qcow2 -o compat=1.1,extended_l2=of": "tapfs convert -O qcow2 -o compat=1.1,extended_l2=off",
    "tapfs create --format=vmdk -o subformat=vmfsS": "tapfs create --format=vmdk -o subformat=vmfsSparse",
    "tapfs amend -f qcow2 -o encrypt.st": "tapfs amend -f qcow2 -o encrypt.state=",
    "tapfs map -f para": "tapfs map -f parallels ",
    "tapfs convert -O para": "tapfs convert -O para",
    "tapfs create -f para": "tapfs create -f para",
    "tapfs mount --engine=pas": "tapfs mount --engine=passthrough",
    "tapfs mount -o allow": "tapfs mount -o allow_other",
    "tapfs info --backing-root im": "tapfs info --backing-root images/",
    "tapfs info kept.qcow2 --snapshot mon": "tapfs info kept.qcow2 --snapshot monday",
    "tapfs dd if=kep": "tapfs dd if=kept.qcow2",
    "tapfs snapshot -a none": "tapfs snapshot -a none",
}


def test_a_shell_completes_what_is_typed(shell: Shell) -> None:
    """Whether a space follows is the shell's own matter."""
    found = {typed: shell.completed(typed) for typed in TYPED}
    assert {typed: line.rstrip() for typed, line in found.items()} == {
        typed: line.rstrip() for typed, line in TYPED.items()
    }


def test_fish_completes_what_is_typed(folder: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"source {folder}/share/fish/vendor_completions.d/tapfs.fish\n"
    script += "".join(f"complete -C '{typed}'; echo =\n" for typed in TYPED)
    done = subprocess.run(
        ["fish", "--no-config", "-c", script],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    offered = [[line.split("\t")[0] for line in part.splitlines()] for part in done.stdout.split("=\n")]
    for (typed, line), words in zip(TYPED.items(), offered, strict=False):
        wanted = line.rstrip().removeprefix(typed[: typed.rindex(" ") + 1]).replace("\\ ", " ")
        assert (words == []) if line == typed else (wanted in words), (typed, words)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("off (default); falloc: the host reserves it; or full", ("off", "falloc", "full")),
        (
            "of a fixed image: off (default); metadata: places; falloc or full: space",
            ("off", "metadata", "falloc", "full"),
        ),
        ("on: as tapdisk has it (default off)", ("on", "off")),
        ("zlib (default) or zstd, for clusters", ("zlib", "zstd")),
        ("dynamic: it grows (default), or fixed: it stands", ("dynamic", "fixed")),
        ("aes-256 (default), serpent-N (N: 128, 192), cast5-128", ("aes-256", "cast5-128")),
        ("bytes, a power of two from 512 to 2M (default 64K)", ()),
        ("milliseconds that it takes", ()),
        ("luks: encrypt it", ("luks",)),
    ],
)
def test_values_are_read_out_of_a_line_of_help(line: str, values: tuple[str, ...]) -> None:
    assert values_of(line) == values


def test_the_scripts_are_no_different_tomorrow() -> None:
    from tapfs.cli.manual.known_words import known_words

    assert bash.script(known_words()) == bash.script(known_words())
    assert zsh.script(known_words()).startswith("#compdef tapfs\n")
