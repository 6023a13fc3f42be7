"""The keys of the simulated machine's xenstore: permissions, transactions and what fires, as Xen's own do it."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

#: What fires for domains that come and go. They have permissions, and are no children of anything.
SPECIAL = ("@introduceDomain", "@releaseDomain")
PATH = re.compile(rf"/|(?:/[A-Za-z0-9\-_@+]+)+|{'|'.join(SPECIAL)}")
PERMISSION = re.compile(r"([nrwb])([0-9]{1,5})")


class RefusedError(Exception):
    """An error reply; `name` is that of an errno."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    @property
    def number(self) -> int:
        return getattr(errno, self.name)


class Key(NamedTuple):
    """One key. `permissions`: owner with all others' letter, then (domain, letter). `generation`: its last change."""

    value: bytes
    permissions: tuple[tuple[int, str], ...]
    children: tuple[str, ...]
    generation: int

    def allows(self, domain: int, letters: str) -> bool:
        """Whether a domain has one of the rights; domain 0 and the owner have all."""
        owner, others = self.permissions[0]
        if domain in (0, owner):
            return True
        right = next((letter for number, letter in self.permissions[1:] if number == domain), others)
        return right in letters


READABLE, WRITABLE = "rb", "wb"


def parent_of(path: str) -> str:
    return path.rpartition("/")[0] or "/"


@dataclass
class Change:
    """What a request did: the path that fires, and what was removed with it."""

    path: str
    removed: list[str] = field(default_factory=list)


class Tree:
    """All keys, or a transaction's copy of them."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {path: Key(b"", ((0, "n"),), (), 0) for path in ("/", *SPECIAL)}
        self.generation = 0

    def copy(self) -> Tree:
        other = Tree()
        other.keys, other.generation = dict(self.keys), self.generation
        return other

    # -- requests; `domain` asks

    def read(self, domain: int, path: str) -> bytes:
        return self._get(domain, path, READABLE).value

    def directory(self, domain: int, path: str) -> Key:
        return self._get(domain, path, READABLE)

    def permissions(self, domain: int, path: str) -> list[str]:
        return [f"{letter}{number}" for number, letter in self._get(domain, path, READABLE).permissions]

    def write(self, domain: int, path: str, value: bytes) -> Change:
        if path in self.keys:
            self._put(path, self._get(domain, path, WRITABLE)._replace(value=value))
        else:
            self._make(domain, path, value)
        return Change(path)

    def make_directory(self, domain: int, path: str) -> Change | None:
        if path in self.keys:
            self._get(domain, path, WRITABLE)
            return None
        self._make(domain, path, b"")
        return Change(path)

    def remove(self, domain: int, path: str) -> Change | None:
        if path == "/":
            raise RefusedError("EINVAL")
        if path not in self.keys:
            if parent_of(path) in self.keys:
                self._get(domain, parent_of(path), WRITABLE)
                return None
            self._get(domain, path, WRITABLE)
        self._get(domain, path, WRITABLE)
        removed = [name for name in self.keys if name.startswith(f"{path}/")]
        for name in (*removed, path):
            del self.keys[name]
        above = self.keys[parent_of(path)]
        leaf = path.rpartition("/")[2]
        self._put(parent_of(path), above._replace(children=tuple(name for name in above.children if name != leaf)))
        return Change(path, removed)

    def set_permissions(self, domain: int, path: str, permissions: list[str]) -> Change:
        matches = [PERMISSION.fullmatch(text) for text in permissions]
        if not matches or None in matches:
            raise RefusedError("EINVAL")
        wanted = tuple((int(match[2]), match[1]) for match in matches if match)
        key = self._get(domain, path, WRITABLE)
        owner = key.permissions[0][0]
        if domain not in (0, owner):
            raise RefusedError("EACCES")
        if domain != 0 and wanted[0][0] != owner:
            raise RefusedError("EPERM")
        self._put(path, key._replace(permissions=wanted))
        return Change(path)

    # -- parts

    def _get(self, domain: int, path: str, letters: str) -> Key:
        if not PATH.fullmatch(path):
            raise RefusedError("EINVAL")
        key = self.keys.get(path)
        if key is not None:
            if not key.allows(domain, letters):
                raise RefusedError("EACCES")
            return key
        above = parent_of(path)
        while above not in self.keys:
            above = parent_of(above)
        # Who may not see the parent is not told what is missing below it.
        raise RefusedError("ENOENT" if self.keys[above].allows(domain, letters) else "EACCES")

    def _make(self, domain: int, path: str, value: bytes) -> None:
        try:
            self._get(domain, path, WRITABLE)
        except RefusedError as refusal:
            if refusal.name != "ENOENT":
                raise
        above = parent_of(path)
        if above not in self.keys:
            self._make(domain, above, b"")
        parent = self.keys[above]
        permissions = parent.permissions
        if domain != 0:
            permissions = ((domain, permissions[0][1]), *permissions[1:])
        self._put(above, parent._replace(children=(*parent.children, path.rpartition("/")[2])))
        self._put(path, Key(value, permissions, (), 0))

    def _put(self, path: str, key: Key) -> None:
        self.generation += 1
        self.keys[path] = key._replace(generation=self.generation)


class Transaction:
    """A copy to work on, which paths that touched, and what to do to the real keys in the end."""

    def __init__(self, tree: Tree) -> None:
        self.start = dict(tree.keys)
        self.tree = tree.copy()
        self.touched: set[str] = set()
        self.changes: list[Callable[[Tree], Change | None]] = []

    def touch(self, path: str) -> None:
        """Note a path, and where it would be missed if it is not there."""
        self.touched.add(path)
        while path not in self.start and path != "/":
            path = parent_of(path)
            self.touched.add(path)

    def commit(self, tree: Tree) -> list[Change]:
        """Make the changes; EAGAIN if what it touched is not as it was at the start."""
        for path in self.touched:
            now, then = tree.keys.get(path), self.start.get(path)
            if (now and now.generation) != (then and then.generation):
                raise RefusedError("EAGAIN")
        return [change for change in (apply(tree) for apply in self.changes) if change is not None]
