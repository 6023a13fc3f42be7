"""The survey: every image under many places, each looked at once, and which images need which."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from tapfs.host.remote.address import Address
from tapfs.many.image_row import FileState, Row, failed_row
from tapfs.many.survey_task import SAME
from tapfs.many.tasks import Runner, Task

if TYPE_CHECKING:
    from tapfs.many.listing import Entry, Listing

#: The module that does the tasks of a survey.
HANDLER = "tapfs.many.survey_task"

#: The length of the identity of an object, which tells no file.
_OF_AN_OBJECT = 2


class Wanted(NamedTuple):
    """What a survey is to tell. `asked`: of `image_row.PARTS`. `whatever`: what is no image is a raw one.

    `keys`: key files of encrypted images, each FILE or IMAGE=FILE.
    `roots`: folders that files named by images must lie in, none: no such file is opened; None: as `Gate()`.
    `sandboxed`: who looks at the images gives up its other rights first.
    """

    asked: tuple[str, ...] = ()
    whatever: bool = False
    roots: tuple[str, ...] | None = None
    sandboxed: bool = False
    keys: tuple[str, ...] = ()


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
    known: Mapping[str, list[Row]] | None = None,
    note: Callable[[Row], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look at every image under the paths, and at those that packages there name.

    `known` has rows of an earlier survey by their paths: those whose files are as they were are taken over. `note` gets
    each row as soon as it is made, without `used_by`. `progress` gets the numbers of files done and in all.
    """
    entries, unlisted = _listed(paths, runner, sandboxed=wanted.sandboxed)
    looks = _Looks(wanted, runner, known or {}, note, progress)
    looks.at(entries)
    named = _named_by_packages(looks.rows, entries)
    if named:
        looks.at(named)
    rows, no_images = looks.rows, looks.no_images
    parts = {key for row in rows for path in row["files"][1:] for key in _keys(row, path)}
    whole = [row for row in rows if not parts.intersection(_keys(row, row["path"]))] if parts else rows
    not_images = sum(_key_of(path) not in parts for path in no_images) if parts else len(no_images)
    _note_users(whole)
    whole.sort(key=lambda row: (row["path"], row["disk"] or 0))
    count = len(rows) - len(whole) + len(no_images) - not_images
    return Survey(whole, not_images, count, looks.reused, unlisted)


class _Looks:
    """The looks at files, and what has come of them."""

    def __init__(
        self,
        wanted: Wanted,
        runner: Runner,
        known: Mapping[str, list[Row]],
        note: Callable[[Row], None] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.rows: list[Row] = []
        self.no_images: list[str] = []
        self.reused = 0
        self._wanted = wanted
        self._runner = runner
        self._known = known
        self._note = note
        self._progress = progress
        self._done = self._all = 0

    def at(self, entries: Sequence[Entry]) -> None:
        """Look at these files, or take over what is known of them."""
        wanted = self._wanted
        common: dict[str, object] = {"do": "look", "sandboxed": wanted.sandboxed}
        # Each word costs every task its time.
        common |= {"asked": list(wanted.asked)} if wanted.asked else {}
        common |= {"all": True} if wanted.whatever else {}
        common |= {"roots": list(wanted.roots)} if wanted.roots is not None else {}
        common |= {"keys": list(wanted.keys)} if wanted.keys else {}
        self._all += len(entries)
        tasks: list[Task] = []
        for entry in entries:
            rows = self._known.get(entry["path"])
            states = None if rows is None or not _may_be_reused(rows, entry, wanted) else _states(rows)
            if rows is not None and states is not None and len(states) == 1:
                self._take_over(rows)
                self._done += 1
                continue
            task = {**common, "path": entry["path"]}
            if entry["identity"] is not None and len(entry["identity"]) == _OF_AN_OBJECT:
                task["identity"] = entry["identity"]
            if states is not None:
                task["known"] = states
            tasks.append(task)
        for number, answer in self._runner.answers(tasks):
            self._take(cast("str", tasks[number]["path"]), answer)

    def _take(self, path: str, answer: Mapping[str, object]) -> None:
        self._done += 1
        result = cast("list[Row] | str | None", answer.get("result"))
        error = cast("dict[str, object] | None", answer.get("error"))
        if error is not None:
            result = [failed_row(path, list(self._wanted.asked), error)]
        if result == SAME:
            result = self._known[path]
            self.reused += len(result)
        elif not result:
            self.no_images.append(path)
        for row in cast("list[Row]", result or ()):
            self.rows.append(row)
            if self._note is not None:
                self._note(row)
        if self._progress is not None:
            self._progress(self._done, self._all)

    def _take_over(self, rows: list[Row]) -> None:
        self.rows += rows
        self.reused += len(rows)


def _named_by_packages(rows: Iterable[Row], entries: Iterable[Entry]) -> list[Entry]:
    """The disks that descriptors of virtual machines name, as far as they are not among the entries."""
    named: dict[object, Entry] = {}
    for row in rows:
        if row["package"] is not None and row["chain"]:
            path = row["chain"][0]["path"]
            state = next((each["state"] for each in row["identities"] if each["path"] == path), None)
            if state is not None and path != row["path"]:
                named.setdefault(tuple(state[:2]), {"path": path, "identity": state})
    if named:
        for entry in entries:
            named.pop(None if entry["identity"] is None else tuple(entry["identity"][:2]), None)
    return list(named.values())


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
                key = tuple(state[:2]) if state is not None and len(state) > _OF_AN_OBJECT else file["path"]
                found.setdefault(key, file)
            places += [folder for folder in listing["folders"] if folder not in seen]
        seen.update(places)
    return list(found.values()), unlisted


def _may_be_reused(rows: list[Row], entry: Entry, wanted: Wanted) -> bool:
    """Whether the rows that an earlier survey made of a file tell what is wanted, as far as the listing shows."""
    return len(rows) == (rows[0]["disks"] or 1) and all(_still_tells(row, entry, wanted) for row in rows)


def _still_tells(row: Row, entry: Entry, wanted: Wanted) -> bool:
    own = next((each["state"] for each in row["identities"] if each["path"] == row["path"]), None)
    locked = row["encrypted"] and row["hash"] is None and row["contents"] is None
    return (
        own is not None
        and own == entry["identity"]
        and set(wanted.asked) <= set(row["asked"])
        and row["error"] is None
        and not row["in_use"]
        and row["health"] != "broken chain"
        and not (wanted.keys and locked)
        and all(part["state"] == "open" for part in row["chain"])
    )


def _states(rows: list[Row]) -> list[FileState]:
    """The files that rows are made of, each once."""
    return list({each["path"]: each for row in rows for each in row["identities"]}.values())


def _keys(row: Row, path: str) -> list[object]:
    """What a file is known by: its device and inode if they are known, and its name."""
    for each in row["identities"]:
        if each["path"] == path and len(each["state"]) > _OF_AN_OBJECT:
            return [tuple(each["state"][:2]), _key_of(path)]
    return [_key_of(path)]


def _key_of(path: str) -> str:
    if path.startswith("/") and "/." not in path and "//" not in path:  # as all of a listing are
        return path.rstrip("/") or path
    return path if Address.parse(path) is not None else os.path.abspath(path)


def _note_users(rows: list[Row]) -> None:
    """Note in each row which images have it in their chain: they cannot be read without it."""
    users: defaultdict[object, list[str]] = defaultdict(list)
    for row in rows:
        for part in row["chain"][row["package"] is None :]:  # what a package names is another file
            for key in _keys(row, part["path"]):
                users[key].append(row["path"])
    for row in rows if users else ():
        row["used_by"] = sorted({user for key in _keys(row, row["path"]) for user in users.get(key, ())})
