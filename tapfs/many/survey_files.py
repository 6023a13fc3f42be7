"""Survey files: the rows of a survey as JSON lines, SQLite or Parquet, and as the journal of one that is not done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from tapfs.disk.json_text import VERSION, unicode_value
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.many.journals import open_journal, whole_lines

if TYPE_CHECKING:
    from tapfs.many.image_row import Row

#: The columns of the table `images`, with their types in SQLite. `row` is the whole row as JSON.
COLUMNS = {
    "path": "TEXT",
    "disk": "INTEGER",
    "disks": "INTEGER",
    "package": "TEXT",
    "format": "TEXT",
    "packed": "TEXT",
    "virtual_size": "INTEGER",
    "file_size": "INTEGER",
    "allocated_size": "INTEGER",
    "encrypted": "INTEGER",
    "in_use": "INTEGER",
    "backing": "TEXT",
    "health": "TEXT",
    "corruptions": "INTEGER",
    "leaks": "INTEGER",
    "leaked_bytes": "INTEGER",
    "hash": "TEXT",
    "error": "TEXT",
    "row": "TEXT",
}

#: The kinds of survey files, by the ends of their names.
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".sqlite": "sqlite", ".db": "sqlite", ".parquet": "parquet"}


def json_line(row: Row) -> str:
    """A row as one line of JSON, without its end."""
    text = json.dumps({"version": VERSION, **row})
    # Only an escaped surrogate can stand for a byte that is no UTF-8.
    return json.dumps(unicode_value({"version": VERSION, **row})) if "\\ud" in text else text


def write_survey(path: str, kind: str, rows: Sequence[Row]) -> None:
    """Write a survey file, which appears under its name when it is whole. Raises ImageError."""
    write: Callable[[str, Sequence[Row]], None] = {"jsonl": _write_lines, "sqlite": _write_sqlite}.get(
        kind, _write_parquet
    )
    new = f"{path}.new-{os.getpid()}"
    with _explained(path, "write the survey"):
        try:
            write(new, rows)
            descriptor = os.open(new, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise


def known_rows(path: str, kind: str) -> dict[str, list[Row]]:
    """The rows of the survey file and of its journal, by their paths; those of the journal are newer.

    Rows of names that are no UTF-8 are left out. Raises ImageError for a file that is no survey.
    """
    rows: dict[tuple[str, int | None], Row] = {}
    if os.path.exists(path):
        read = {"jsonl": _read_lines, "sqlite": _read_sqlite}.get(kind, _read_parquet)
        with _explained(path, "read the survey"):
            for text in read(path):
                _take(rows, text, path)
    with suppress(FileNotFoundError), open(journal_of(path), "r+b") as journal:
        for line in whole_lines(journal):
            _take(rows, line, journal_of(path))
    found: dict[str, list[Row]] = {}
    for (name, _), row in rows.items():
        found.setdefault(name, []).append(row)
    return found


def journal_of(path: str) -> str:
    """The name of the journal beside a survey file."""
    return f"{path}.partial"


class Journal:
    """The rows of a survey that is not done: a context that leaves them where it ends early, and else removes them."""

    def __init__(self, path: str, *, resume: bool) -> None:
        """Begin the journal of the survey file, or with `resume` go on with it. Raises ImageError."""
        self._path = journal_of(path)
        with _explained(self._path, "write the journal"):
            self._file = open_journal(self._path, empty=not resume)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._file.close()
        if error is None:
            with suppress(OSError):
                os.unlink(self._path)

    def note(self, row: Row) -> None:
        """Keep a row. Raises ImageError."""
        with _explained(self._path, "write the journal"):
            self._file.write(json_line(row).encode() + b"\n")
            self._file.flush()


def _take(rows: dict[tuple[str, int | None], Row], text: str | bytes, path: str) -> None:
    try:
        row = cast("dict[str, object]", json.loads(text))
        name, disk, version = cast("str", row["path"]), cast("int | None", row["disk"]), row.pop("version")
        if version != VERSION or not isinstance(row["identities"], list):
            raise ValueError(version)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(
            ErrorKind.INVALID_FORMAT,
            "is no survey of this version of tapfs",
            path=path,
            op="read the survey",
            remedy="name another file, or leave out --resume to replace it",
        ) from error
    if "_base64" not in repr(row.keys() | {key for part in cast("Row", row)["chain"] for key in part}):
        rows[name, disk] = cast("Row", row)


def _flat(row: Row) -> dict[str, object]:
    """A row as the columns of `COLUMNS`."""
    plain = cast("dict[str, object]", unicode_value(row))
    chain, error = row["chain"], row["error"]
    flat = {name: plain.get(name) for name in COLUMNS}
    flat["backing"] = unicode_value(chain[1]["path"]) if len(chain) > 1 else None
    flat["error"] = None if error is None else unicode_value(str(error["message"]))
    flat["row"] = json_line(row)
    return flat


def _write_lines(path: str, rows: Sequence[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json_line(row) + "\n" for row in rows)


def _read_lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file


def _write_sqlite(path: str, rows: Sequence[Row]) -> None:
    import sqlite3

    connection = sqlite3.connect(path)
    try:
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        connection.executescript(
            f"CREATE TABLE images ({columns}, PRIMARY KEY (path, disk));"
            "CREATE TABLE chains (image TEXT, disk INTEGER, depth INTEGER, path TEXT, format TEXT, state TEXT);"
            "CREATE TABLE users (image TEXT, used_by TEXT);"
            "CREATE TABLE file_systems (image TEXT, disk INTEGER, partition INTEGER, start INTEGER, size INTEGER,"
            " type TEXT, label TEXT, uuid TEXT);"
        )
        marks = ", ".join(f":{name}" for name in COLUMNS)
        connection.executemany(f"INSERT INTO images VALUES ({marks})", map(_flat, rows))  # noqa: S608  names of ours
        for row in cast("list[Row]", [unicode_value(row) for row in rows]):
            image = row["path"]
            connection.executemany(
                "INSERT INTO chains VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (image, row["disk"], depth, link["path"], link["format"], link["state"])
                    for depth, link in enumerate(row["chain"])
                ],
            )
            connection.executemany("INSERT INTO users VALUES (?, ?)", [(image, user) for user in row["used_by"]])
            connection.executemany("INSERT INTO file_systems VALUES (?, ?, ?, ?, ?, ?, ?, ?)", _file_systems(row))
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.commit()
    finally:
        connection.close()


def _file_systems(row: Row) -> Iterator[tuple[object, ...]]:
    """The file systems of an image as rows; partition 0 is the whole disk."""
    contents = row["contents"]
    if contents is None:
        return
    image = row["path"], row["disk"]
    whole = contents["file_system"]
    if whole is not None:
        yield *image, 0, 0, row["virtual_size"], whole["type"], whole["label"], whole["uuid"]
    for each in contents["partitions"]["table"]:
        found = each["file_system"]
        if found is not None:
            yield *image, each["number"], each["start"], each["size"], found["type"], found["label"], found["uuid"]


def _read_sqlite(path: str) -> Iterator[str]:
    import sqlite3

    connection = sqlite3.connect(
        f"file:{os.path.abspath(path).replace('?', '%3f').replace('#', '%23')}?mode=ro", uri=True
    )
    try:
        yield from (text for (text,) in connection.execute("SELECT row FROM images"))
    finally:
        connection.close()


def _write_parquet(path: str, rows: Sequence[Row]) -> None:
    arrow, parquet = _arrow()
    kinds = {"TEXT": arrow.string(), "INTEGER": arrow.int64()}
    names = arrow.list_(arrow.string())
    fields = [*((name, kinds[kind]) for name, kind in COLUMNS.items()), ("chain", names), ("used_by", names)]
    columns: dict[str, list[object]] = {name: [] for name, _ in fields}
    for row in rows:
        flat = _flat(row)
        flat["chain"] = unicode_value([each["path"] for each in row["chain"]])
        flat["used_by"] = unicode_value(row["used_by"])
        for name, values in columns.items():
            value = flat[name]
            values.append(int(value) if isinstance(value, bool) else value)
    parquet.write_table(arrow.table(columns, schema=arrow.schema(fields)), path, compression="zstd")


def _read_parquet(path: str) -> Iterator[str]:
    _, parquet = _arrow()
    yield from parquet.read_table(path, columns=["row"]).column("row").to_pylist()


def _arrow() -> tuple[Any, Any]:
    """The packages for Parquet. Raises ImageError(unsupported) where they are not installed."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "Parquet needs the Python package pyarrow",
            op="write the survey",
            remedy="install it: pip install 'tapfs[parquet]', or write .jsonl or .sqlite",
        ) from error


@contextmanager
def _explained(path: str, op: str) -> Generator[None]:
    """Make ImageErrors of what the host, SQLite and pyarrow raise."""
    try:
        yield
    except ImageError as error:
        error.path = error.path or path
        raise
    except OSError as error:
        raise from_os_error(error, path=path, op=op) from error
    except Exception as error:
        if not isinstance(error, ValueError) and type(error).__module__.partition(".")[0] not in {"sqlite3", "pyarrow"}:
            raise
        message = f"cannot be used: {str(error).partition(chr(10))[0] or type(error).__name__}"
        raise ImageError(ErrorKind.INVALID_FORMAT, message, path=path, op=op, remedy="name another file") from error
