"""The completion of bash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.manual.described import Command, Kind, Word

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tapfs.cli.manual.known_words import KnownWords

_FUNCTIONS = r"""
# The image that is named on the line: the first word that is a file.
_tapfs_image() {
    local word
    for word in "${words[@]:2}"; do
        if [[ $word != -* && -f $word ]]; then printf '%s' "$word"; return; fi
    done
}

_tapfs_snapshots() {
    local image
    image=$(_tapfs_image)
    [[ -z $image ]] || tapfs snapshot --list --force-share --json "$image" 2>/dev/null </dev/null |
        grep -Eo '"(id|name)": *"[^"\\]+"' | sed 's/.*: *"//; s/"$//'
}

_tapfs_mounted() {
    tapfs list --json 2>/dev/null </dev/null | grep -Eo '"mountpoint": *"[^"\\]+"' | sed 's/.*: *"//; s/"$//'
}

_tapfs_ram_disks() {
    local file
    for file in /dev/shm/tapfs.ram.*; do [[ ! -e $file ]] || printf 'ram:%s\n' "${file#/dev/shm/tapfs.ram.}"; done
}

# The format that the options in $1 name.
_tapfs_format() {
    local place option IFS=' '
    for ((place = 2; place < ${#words[@]}; place++)); do
        for option in $1; do
            case ${words[place]} in
            "$option") printf '%s' "${words[place + 1]}"; return ;;
            "$option"=*) printf '%s' "${words[place]#*=}"; return ;;
            esac
        done
    done
}

# Offer lines, of which those count that begin as the word does. What bash takes for done (before '=' and ':') is cut.
_tapfs_offer() {
    local line IFS=$'\n' shown=$cur done=""
    [[ $cur != *[=:]* ]] || done=${cur%"${cur##*[=:]}"}
    for line in $1; do
        [[ $line != "$shown"* ]] || COMPREPLY+=("${line#"$done"}")
    done
}

# KEY=VALUE,...: the keys of $1, or the values of a key.
_tapfs_pairs() {
    local kind=$1 format=$2 before="" pair=$cur key found
    if [[ $pair == *,* ]]; then before=${pair%,*},; pair=${pair##*,}; fi
    if [[ $pair == *=* ]]; then
        key=${pair%%=*}
        found=$(_tapfs_values "$kind:$format:$key" | sed "s|^|$before$key=|")
    else
        found=$(_tapfs_keys "$kind:$format" | sed "s|^|$before|")
        compopt -o nospace
    fi
    _tapfs_offer "$found"
}

_tapfs_complete() {
    case $1 in
    file) compopt -o filenames; mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "${cur##*=}") ;;
    folder) compopt -o filenames; mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -d -- "${cur##*=}") ;;
    format) _tapfs_offer "$_tapfs_formats" ;;
    new-format) _tapfs_offer "$_tapfs_new_formats" ;;
    snapshot) _tapfs_offer "$(_tapfs_snapshots)" ;;
    mounted) _tapfs_offer "$(_tapfs_mounted)"; _tapfs_complete file ;;
    ram-disk) _tapfs_offer "$(_tapfs_ram_disks)" ;;
    operands)
        case $cur in
        if=*|of=*) _tapfs_complete file ;;
        *) compopt -o nospace; _tapfs_offer $'if=\nof=\nbs=\ncount=\nskip=\nisize=\nosize=' ;;
        esac ;;
    create-options | amend-options) _tapfs_pairs "$1" "$(_tapfs_format "$(_tapfs_format_options "$command")")" ;;
    mount-options) _tapfs_pairs "$1" "" ;;
    other) ;;
    *) _tapfs_offer "${1// /$'\n'}" ;;
    esac
}

_tapfs() {
    local IFS=$' \t\n' cur command words line=${COMP_LINE:0:COMP_POINT}
    COMPREPLY=()
    # bash cuts words at '=' and ':', tapfs does not. Without -r a '\ ' is a space in a name.
    read -a words <<< "$line"
    [[ $line != *[[:space:]] ]] || words+=("")
    cur=${words[-1]}
    command=${words[1]}
    if ((${#words[@]} == 2)); then _tapfs_offer "$_tapfs_commands"; return; fi
    local before=${words[-2]} IFS=$'\n' kind
    if [[ $cur == --*=* ]]; then
        kind=$(_tapfs_kind "$command ${cur%%=*}")
        local whole=$cur
        cur=${cur#*=}
        _tapfs_complete "${kind:-other}"
        cur=$whole
    elif ((${#words[@]} > 3)) && kind=$(_tapfs_kind "$command $before") && [[ -n $kind ]]; then
        _tapfs_complete "$kind"
    elif [[ $cur == -* ]]; then
        _tapfs_offer "$(_tapfs_options "$command")"
    else
        _tapfs_complete "$(_tapfs_operand "$command")"
    fi
}

complete -F _tapfs tapfs
"""


def script(known: KnownWords) -> str:
    """The script, which needs nothing but bash."""
    commands = known.commands
    keys = {f"{kind}:{name}": of_format for (kind, name), of_format in known.keys.items()}
    parts = [
        "# bash completion of tapfs, made by python -m tapfs.cli.manual from the parsers and the drivers.",
        _variable("_tapfs_commands", [*(command.name for command in commands), "help"]),
        _variable("_tapfs_formats", known.formats),
        _variable("_tapfs_new_formats", known.new_formats),
        _table("_tapfs_options", {command.name: _options(command) for command in commands}),
        _table("_tapfs_operand", {each.name: [_offered(word) for word in each.operands[:1]] for each in commands}),
        _table("_tapfs_format_options", {name: [" ".join(options)] for name, options in known.format_options.items()}),
        _table("_tapfs_kind", dict(_kinds(commands))),
        _table(
            "_tapfs_keys",
            {
                place: [key if values is None else f"{key}=" for key, values in of_format.items()]
                for place, of_format in keys.items()
            },
        ),
        _table(
            "_tapfs_values",
            {
                f"{place}:{key}": list(values or ())
                for place, of_format in keys.items()
                for key, values in of_format.items()
            },
        ),
    ]
    return "\n".join(parts) + _FUNCTIONS


def _variable(name: str, words: Iterable[str]) -> str:
    return f"{name}=$'" + "\\n".join(words) + "'"


def _table(name: str, lines: Mapping[str, list[str]]) -> str:
    """A function that prints the lines for its argument, with the arguments of equal lines together."""
    together: dict[str, list[str]] = {}
    for argument, found in lines.items():
        if found:
            together.setdefault(" ".join(f"'{line}'" for line in found), []).append(f"'{argument}'")
    cases = "".join(f"    {'|'.join(words)}) printf '%s\\n' {found} ;;\n" for found, words in together.items())
    return f"{name}() {{\n    case $1 in\n{cases}    esac\n}}"


def _options(command: Command) -> list[str]:
    return [option for word in command.options for option in word.options]


def _kinds(commands: Iterable[Command]) -> Iterable[tuple[str, list[str]]]:
    for command in commands:
        for word in command.options:
            if word.value and not word.optional:
                yield from ((f"{command.name} {option}", [_offered(word)]) for option in word.options)


def _offered(word: Word) -> str:
    """The choices, else the kind of the value."""
    return " ".join(word.choices) if word.kind is Kind.CHOICE else str(word.kind)
