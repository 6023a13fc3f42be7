"""The completion of fish."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.manual.described import Command, Kind, Word

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tapfs.cli.manual.known_words import KnownWords

#: The offers for a value; None: files.
_OFFERED = {
    Kind.FILE: None,
    Kind.FOLDER: "(__fish_complete_directories (commandline -ct))",
    Kind.FORMAT: "$__tapfs_formats",
    Kind.NEW_FORMAT: "$__tapfs_new_formats",
    Kind.SNAPSHOT: "(__tapfs_snapshots)",
    Kind.MOUNTED: "(__tapfs_mounted)",
    Kind.RAM_DISK: "(__tapfs_ram_disks)",
    Kind.OPERANDS: "(__tapfs_operands)",
    Kind.OTHER: "",
}

_FUNCTIONS = r"""
function __tapfs_command
    set -l words (commandline -opc)
    test (count $words) -gt 1; and echo $words[2]
end

function __tapfs_is
    test "$(__tapfs_command)" = $argv[1]
end

function __tapfs_none
    test (count (commandline -opc)) = 1
end

function __tapfs_snapshots
    for word in (commandline -opc)[3..]
        if not string match -q -- '-*' $word; and test -f $word
            tapfs snapshot --list --force-share --json $word 2>/dev/null </dev/null |
                string match -rag '"(?:id|name)": *"([^"\\\\]+)"'
            return
        end
    end
end

function __tapfs_mounted
    tapfs list --json 2>/dev/null </dev/null | string match -rag '"mountpoint": *"([^"\\\\]+)"'
end

function __tapfs_ram_disks
    for file in /dev/shm/tapfs.ram.*
        string replace /dev/shm/tapfs.ram. ram: $file
    end
end

function __tapfs_operands
    set -l word (commandline -ct)
    if string match -qr '^(if|of)=' -- $word
        for file in (__fish_complete_path (string replace -r '^[a-z]+=' '' -- $word))
            echo (string match -r '^[a-z]+=' -- $word)[1]$file
        end
    else
        printf '%s=\n' if of bs count skip isize osize
    end
end

# KEY=VALUE,...: the keys, or the values of a key, of the format that one of the options names.
function __tapfs_pairs --argument-names kind
    set -l words (commandline -opc)
    set -l format ""
    for option in $argv[2..]
        for place in (seq 3 (count $words))
            if test "$words[$place]" = $option
                set format $words[(math $place + 1)]
            else if string match -q -- "$option=*" $words[$place]
                set format (string replace -- "$option=" "" $words[$place])
            end
        end
    end
    set -l word (commandline -ct)
    set -l before (string match -r '^.*,' -- $word)
    set -l pair (string replace -r '^.*,' '' -- $word)
    if string match -q '*=*' -- $pair
        set -l key (string replace -r '=.*' '' -- $pair)
        for value in (__tapfs_values "$kind:$format:$key")
            echo "$before$key=$value"
        end
    else
        for key in (__tapfs_keys "$kind:$format")
            echo "$before$key"
        end
    end
end

"""


def script(known: KnownWords) -> str:
    """The script."""
    keys = {f"{kind}:{name}": of_format for (kind, name), of_format in known.keys.items()}
    lines = [
        "# fish completion of tapfs, made by python -m tapfs.cli.manual from the parsers and the drivers.",
        f"set -g __tapfs_formats {' '.join(known.formats)}",
        f"set -g __tapfs_new_formats {' '.join(known.new_formats)}",
        _table(
            "__tapfs_keys", {place: [k if v is None else f"{k}=" for k, v in of.items()] for place, of in keys.items()}
        ),
        _table("__tapfs_values", {f"{place}:{k}": list(v or ()) for place, of in keys.items() for k, v in of.items()}),
    ]
    text = "\n".join(lines) + _FUNCTIONS
    text += "complete -c tapfs -e\ncomplete -c tapfs -f -n __tapfs_none\n"
    for command in known.commands:
        text += f"complete -c tapfs -n __tapfs_none -a {command.name} -d {_quoted(command.summary)}\n"
    text += "complete -c tapfs -n __tapfs_none -a help -d 'explain a command'\n"
    text += f"complete -c tapfs -f -n '__tapfs_is help' -a {_quoted(' '.join(each.name for each in known.commands))}\n"
    for command in known.commands:
        text += "".join(_command(command, " ".join(known.format_options[command.name])))
    return text


def _command(command: Command, formats: str) -> Iterable[str]:
    condition = f"-n '__tapfs_is {command.name}'"
    for word in command.options:
        names = [f"-s {each[1:]}" if len(each) == 2 else f"-l {each[2:]}" for each in word.options]
        line = f"complete -c tapfs {condition} {' '.join(names)}"
        if word.value and not word.optional:
            line += _value(word, formats)
        yield f"{line} -d {_quoted(' '.join(word.help.split()))}\n"
    for word in command.operands[:1]:
        offered = _offered(word, formats)
        if offered is not None:
            only = "" if word.kind is Kind.MOUNTED else " -f"
            yield f"complete -c tapfs {condition}{only}{f' -a {_quoted(offered)}' if offered else ''}\n"
    if not command.operands:
        yield f"complete -c tapfs {condition} -f\n"


def _value(word: Word, formats: str) -> str:
    offered = _offered(word, formats)
    return " -r" if offered is None else f" -x{f' -a {_quoted(offered)}' if offered else ''}"


def _offered(word: Word, formats: str) -> str | None:
    if word.kind is Kind.CHOICE:
        return " ".join(word.choices)
    if word.kind in (Kind.CREATE_OPTIONS, Kind.AMEND_OPTIONS, Kind.MOUNT_OPTIONS):
        return f"(__tapfs_pairs {word.kind} {formats})"
    return _OFFERED[word.kind]


def _table(name: str, lines: Mapping[str, list[str]]) -> str:
    cases = "".join(
        f"        case {_quoted(argument)}\n            printf '%s\\n' {' '.join(map(_quoted, found))}\n"
        for argument, found in lines.items()
        if found
    )
    return f"function {name}\n    switch $argv[1]\n{cases}    end\nend\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
