"""The survey: every image under many places, each looked at once, and which images need which."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from tapfs.host.remote.address import Address
from tapfs.many.image_row import Row, failed_row
from tapfs.many.survey_task import SAME
from tapfs.many.tasks import Runner, Task

if TYPE_CHECKING:
    from tapfs.many.listing import Entry, Listing

#: The module that does the tasks of a survey.
HANDLER = "tapfs.many.survey_task"


class Wanted(NamedTuple):
    """What a survey is to tell. `asked`: of `image_row.PARTS`. `whatever`: what is no image is a raw one.

    `roots`: folders that files named by images must lie in, none: no such file is opened; None: as `Gate()`.
    `sandboxed`: who looks at the images gives up its other rights first, which all of them being local needs.
    """

    asked: tuple[str, ...] = ()
    whatever: bool = False
    roots: tuple[str, ...] | None = None
    sandboxed: bool = False


class Unlisted(NamedTuple):
    """A place that could not be listed, and why, in the words of an error's message."""

    path: str
    message: str


class Survey(NamedTuple):
    """What was found. `rows` by their paths.

    `not_images` counts files that are no images, `parts` files that belong to an image which names them, such as the
    extents of a VMDK, `reused` the rows that an earlier survey had made.
    """

    rows: list[Row]
    not_images: int
    parts: int
    reused: int
    unlisted: list[Unlisted]


def make_survey(
    paths: Sequence[str],
    wanted: Wanted,
    runner: Runner,
    *,
    known: Mapping[str, Row] | None = None,
    note: Callable[[Row], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look at every image under the paths.

    `known` has rows of an earlier survey by their paths: those whose files are as they were are taken over. `note` gets
    each row as soon as it is made, without `used_by`. `progress` gets the numbers of files done and in all.
    """
    entries, unlisted = _listed(paths, runner, sandboxed=wanted.sandboxed)
    rows: list[Row] = []
    tasks: list[Task] = []
    reused = 0
    for entry in entries:
        row = (known or {}).get(entry["path"])
        usable = row is not None and _may_be_reused(row, entry, wanted)
        if usable and row is not None and len(row["identities"]) == 1:
            rows.append(row)
            reused += 1
            continue
        task: dict[str, object] = {
            "do": "look",
            "path": entry["path"],
            "identity": entry["identity"],
            "asked": list(wanted.asked),
            "all": wanted.whatever,
            "sandboxed": wanted.sandboxed,
            "roots": None if wanted.roots is None else list(wanted.roots),
        }
        if usable and row is not None:
            task["known"] = row["identities"]
        tasks.append(task)
    done = len(rows)
    no_images: list[Task] = []
    for number, answer in runner.answers(tasks):
        done += 1
        path = cast("str", tasks[number]["path"])
        result = cast("Row | str | None", answer.get("result"))
        error = cast("dict[str, object] | None", answer.get("error"))
        if error is not None:
            row = failed_row(path, list(wanted.asked), error)
        elif result == SAME:
            row = (known or {})[path]
            reused += 1
        elif result is None:
            no_images.append(tasks[number])
            row = None
        else:
            row = cast("Row", result)
        if row is not None:
            rows.append(row)
            if note is not None:
                note(row)
        if progress is not None:
            progress(done, len(entries))
    parts = {key for row in rows for path in row["files"][1:] for key in _keys(row, path)}
    whole = [row for row in rows if not parts.intersection(_keys(row, row["path"]))] if parts else rows
    not_images = sum(_key_of(cast("str", task["path"])) not in parts for task in no_images) if parts else len(no_images)
    _note_users(whole)
    whole.sort(key=lambda row: row["path"])
    return Survey(whole, not_images, len(rows) - len(whole) + len(no_images) - not_images, reused, unlisted)


def _listed(paths: Iterable[str], runner: Runner, *, sandboxed: bool) -> tuple[list[Entry], list[Unlisted]]:
    """Every file under the paths once, by the first of its names."""
    found: dict[object, Entry] = {}
    unlisted: list[Unlisted] = []
    places = list(dict.fromkeys(paths))
    named = True
    seen = set(places)
    while places:
        tasks: list[Task] = [{"do": "list", "path": place, "named": named, "sandboxed": sandboxed} for place in places]
        listings: list[tuple[int, Listing]] = []
        for number, answer in runner.answers(tasks):
            error = cast("Mapping[str, object] | None", answer.get("error"))
            if error is not None:
                unlisted.append(Unlisted(places[number], str(error["message"])))
            else:
                listings.append((number, cast("Listing", answer["result"])))
        places, named = list[str](), False
        for _, listing in sorted(listings, key=lambda each: each[0]):
            for file in listing["files"]:
                state = file["identity"]
                key = tuple(state[:2]) if state is not None and len(state) > 2 else file["path"]
                found.setdefault(key, file)
            places += [folder for folder in listing["folders"] if folder not in seen]
        seen.update(places)
    return list(found.values()), unlisted


def _may_be_reused(row: Row, entry: Entry, wanted: Wanted) -> bool:
    """Whether the row of an earlier survey tells what is wanted, as far as the listing shows."""
    own = next((each["state"] for each in row["identities"] if each["path"] == row["path"]), None)
    return (
        own is not None
        and own == entry["identity"]
        and set(wanted.asked) <= set(row["asked"])
        and row["error"] is None
        and not row["in_use"]
        and row["health"] != "broken chain"
        and all(part["state"] == "open" for part in row["chain"])
    )


def _keys(row: Row, path: str) -> list[object]:
    """What a file is known by: its device and inode if they are known, and its name."""
    state = next((each["state"] for each in row["identities"] if each["path"] == path), None)
    return [tuple(state[:2]), _key_of(path)] if state is not None and len(state) > 2 else [_key_of(path)]


def _key_of(path: str) -> str:
    if path.startswith("/") and "/." not in path and "//" not in path:  # as all of a listing are
        return path.rstrip("/") or path
    return path if Address.parse(path) is not None else os.path.abspath(path)


def _note_users(rows: list[Row]) -> None:
    """Note in each row which images have it in their chain: they cannot be read without it."""
    users: defaultdict[object, list[str]] = defaultdict(list)
    for row in rows:
        for part in row["chain"][1:]:
            for key in _keys(row, part["path"]):
                users[key].append(row["path"])
    for row in rows if users else ():
        row["used_by"] = sorted({user for key in _keys(row, row["path"]) for user in users.get(key, ())})
