"""The completion of zsh."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tapfs.cli.manual.described import Kind, Word

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tapfs.cli.manual.known_words import KnownWords

#: With a space before it `_arguments` calls a function with no words but those that stand here.
_ACTIONS = {
    Kind.FILE: "_files",
    Kind.FOLDER: "_files -/",
    Kind.FORMAT: " _tapfs_formats",
    Kind.NEW_FORMAT: " _tapfs_new_formats",
    Kind.SNAPSHOT: " _tapfs_snapshots",
    Kind.MOUNTED: " _tapfs_mounted",
    Kind.RAM_DISK: " _tapfs_ram_disks",
    Kind.OPERANDS: " _tapfs_operands",
    Kind.OTHER: " ",
}

_FUNCTIONS = r"""
_tapfs_snapshots() {
    local word image
    for word in "${(@Q)words[2,-1]}"; do
        if [[ $word != -* && -f $word ]]; then image=$word; break; fi
    done
    [[ -n $image ]] || return
    _tapfs_lines snapshot ${(f)"$(tapfs snapshot --list --force-share --json $image 2>/dev/null </dev/null |
        grep -Eo '"(id|name)": *"[^"\\]+"' | sed 's/.*: *"//; s/"$//')"}
}

_tapfs_mounted() {
    _tapfs_lines mount ${(f)"$(tapfs list --json 2>/dev/null </dev/null |
        grep -Eo '"mountpoint": *"[^"\\]+"' | sed 's/.*: *"//; s/"$//')"}
    _files
}

_tapfs_ram_disks() {
    local -a found=(/dev/shm/tapfs.ram.*(N:t))
    _tapfs_lines 'RAM disk' ram:${^found#tapfs.ram.}
}

_tapfs_lines() {
    local expl
    local -a found=("${(@)argv[2,-1]}")
    (($#found)) && _wanted words expl $1 compadd -a found
}

_tapfs_operands() {
    if compset -P '(if|of)='; then _files; return; fi
    [[ $PREFIX == *=* ]] || compadd -S '=' - if of bs count skip isize osize
}

# KEY=VALUE,...: the keys, or the values of a key, of the format that the options of $2 name.
_tapfs_pairs() {
    local kind=$1 format option key
    local -a found
    for option in ${=2}; do
        [[ -z ${words[(r)$option=*]} ]] || format=${words[(r)$option=*]#*=}
        local place=${words[(i)$option]}
        ((place < $#words)) && format=${words[place + 1]}
    done
    compset -P '*,'
    if [[ $PREFIX == *=* ]]; then
        key=${PREFIX%%=*}
        compset -P '*='
        found=(${(f)"$(_tapfs_values $kind:$format:$key)"})
        (($#found)) && compadd -a found
    else
        found=(${(f)"$(_tapfs_keys $kind:$format)"})
        (($#found)) && compadd -S '' -a found
    fi
}

_tapfs() {
    local curcontext=$curcontext state line
    local -a commands
    _arguments -C -A '-*' '(- :)--version[show the version]' '(- :)'{-h,--help}'[show the help]' \
        '1:command:->command' '*::argument:->argument'
    case $state in
    command) _tapfs_commands; _describe command commands ;;
    argument) curcontext=${curcontext%:*:*}:tapfs-$words[1]:; _tapfs_arguments $words[1] ;;
    esac
}

_tapfs "$@"
"""


def script(known: KnownWords) -> str:
    """The script, an autoloaded function."""
    commands = [_quoted(f"{each.name}:{_escaped(each.summary)}") for each in known.commands]
    commands.append(_quoted("help:explain a command"))
    keys = {f"{kind}:{name}": of_format for (kind, name), of_format in known.keys.items()}
    parts = [
        "#compdef tapfs",
        "# zsh completion of tapfs, made by python -m tapfs.cli.manual from the parsers and the drivers.",
        f"_tapfs_formats() {{ compadd - {' '.join(known.formats)} }}",
        f"_tapfs_new_formats() {{ compadd - {' '.join(known.new_formats)} }}",
        f"_tapfs_commands() {{\n    commands=(\n{_indented(commands, 8)}    )\n}}",
        _table(
            "_tapfs_keys", {place: [k if v is None else f"{k}=" for k, v in of.items()] for place, of in keys.items()}
        ),
        _table("_tapfs_values", {f"{place}:{k}": list(v or ()) for place, of in keys.items() for k, v in of.items()}),
        _arguments(known),
    ]
    return "\n".join(parts) + _FUNCTIONS


def _arguments(known: KnownWords) -> str:
    cases: list[str] = []
    for command in known.commands:
        formats = " ".join(known.format_options[command.name])
        words = [line for word in command.options for line in _option(word, formats)]
        words += _operands(command.operands)
        lines = " \\\n        ".join(words)
        cases.append(f"    {command.name}) _arguments -s -S \\\n        {lines} ;;\n")
    cases.append("    help) _tapfs_commands; _describe command commands ;;\n")
    return f"_tapfs_arguments() {{\n    case $1 in\n{''.join(cases)}    esac\n}}"


def _option(word: Word, formats: str) -> Iterable[str]:
    others = "" if word.again else f"({' '.join(word.options)})"
    for option in word.options:
        start = f"*{option}" if word.again else f"{others}{option}"
        explained = f"[{_escaped(word.help)}]"
        if not word.value:
            yield _quoted(f"{start}{explained}")
            continue
        behind = "=" if option.startswith("--") else "+"
        value = f"{'::' if word.optional else ':'}{_escaped(word.value)}:{_action(word, formats)}"
        yield _quoted(f"{start}{behind}{explained}{value}")


def _operands(words: list[Word]) -> Iterable[str]:
    for place, word in enumerate(words, start=1):
        number = "*" if word.again else f"{place}"
        yield _quoted(
            f"{number}:{':' if word.optional and not word.again else ''}{_escaped(word.value)}:{_action(word, '')}"
        )


def _action(word: Word, formats: str) -> str:
    if word.kind is Kind.CHOICE:
        return f"({' '.join(word.choices)})"
    if word.kind in (Kind.CREATE_OPTIONS, Kind.AMEND_OPTIONS, Kind.MOUNT_OPTIONS):
        return f' _tapfs_pairs {word.kind} "{formats}"'
    return _ACTIONS[word.kind]


def _table(name: str, lines: Mapping[str, list[str]]) -> str:
    cases = [
        f"({argument}) print -l - {' '.join(map(_quoted, found))} ;;" for argument, found in lines.items() if found
    ]
    return f"{name}() {{\n    case $1 in\n{_indented(cases, 4)}    esac\n}}"


def _indented(lines: Iterable[str], width: int) -> str:
    return "".join(f"{' ' * width}{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return re.sub(r"([\\:\[\]])", r"\\\1", " ".join(text.split()))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
