"""The tree of a mount as a table of nodes, which says nothing of how the nodes are served.

Inode numbers are given in the order of adding and never change. So a server of the data nodes beside pyfuse3 needs only
this table.
"""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tapfs.records import dataclass, field

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.kernel.fuse_server import Pieces
    from tapfs.partitions.table import Partition

ROOT_INODE = 1

#: The name of a partition's node is this and its number.
PARTITION = b"part"


class PartitionWindow(NamedTuple):
    """A partition of the tree: its number, and its bytes of the disk."""

    number: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Window:
    """Data: the bytes ``[start, start + size)`` of the virtual disk."""

    start: int
    size: int


class KeptDisk:
    """A disk beside that of the mount, which never changes: a snapshot. It is opened when it is first read.

    `size` is in bytes, `modified_ns` in nanoseconds since 1970.
    """

    def __init__(self, size: int, modified_ns: int, open_image: Callable[[], Image]) -> None:
        self.size = size
        self.modified_ns = modified_ns
        self._open_image = open_image
        self._image: Image | None = None
        self._lock = threading.Lock()

    def image(self) -> Image:
        """The open disk, for any thread; it may block. Raises ImageError."""
        with self._lock:
            if self._image is None:
                self._image = self._open_image()
            return self._image

    def close(self) -> None:
        """Close the disk if it was opened."""
        with self._lock:
            if self._image is not None:
                self._image.close()


class ServedFile(Protocol):
    """The bytes of a file that does not change."""

    @property
    def size(self) -> int:
        """Its length."""
        ...

    @property
    def metadata(self) -> int:
        """A descriptor of a file in memory: what lies between the pieces of the disk. Open until `close`."""
        ...

    @property
    def pieces(self) -> Pieces:
        """The pieces of the disk."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes, fewer only at the end; for any thread, and it may block. Raises ImageError."""
        ...

    def try_read(self, offset: int, length: int) -> bytes | None:
        """The same, or None if it would have to wait."""
        ...

    def close(self) -> None:
        """Let go of it; closing twice is allowed."""
        ...


class MadeFile:
    """A file that is made when somebody first looks at it: the disk as an image of another format.

    Who serves it may set `when_made`: the file is given to that before anybody sees it.
    """

    def __init__(self, make: Callable[[], ServedFile]) -> None:
        self._make = make
        self._made: ServedFile | None = None
        self._lock = threading.Lock()
        self.when_made: Callable[[ServedFile], None] = lambda _: None

    def file(self) -> ServedFile:
        """The file, for any thread; it may block. Raises ImageError, and is made anew at the next look then."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
                self.when_made(self._made)
            return self._made

    def close(self) -> None:
        """Let go of it if it was made."""
        with self._lock:
            if self._made is not None:
                self._made.close()


@dataclass(frozen=True, slots=True)
class Document:
    """Text made when it is asked for; `text` may block."""

    text: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Directory:
    """Names and the inodes that they lead to, in the order of listing."""

    children: dict[bytes, int] = field(default_factory=dict[bytes, int])


Content = Window | KeptDisk | MadeFile | Document | Directory


@dataclass(frozen=True, slots=True)
class Node:
    """One entry of the tree; `mode` holds type and permissions."""

    inode: int
    parent: int
    name: bytes
    mode: int
    content: Content


class Tree:
    """All nodes of a mount by inode."""

    def __init__(self) -> None:
        root = Node(ROOT_INODE, ROOT_INODE, b"", stat.S_IFDIR | 0o555, Directory())
        self._nodes = {ROOT_INODE: root}

    def add(self, parent: int, name: bytes, permissions: int, content: Content) -> Node:
        """Add an entry to the directory with inode `parent`."""
        directory = self.directory(parent)
        if directory is None or name in directory.children:
            raise ValueError(name)
        kind = stat.S_IFDIR if isinstance(content, Directory) else stat.S_IFREG
        node = Node(max(self._nodes) + 1, parent, name, kind | permissions, content)
        self._nodes[node.inode] = node
        directory.children[name] = node.inode
        return node

    @property
    def partitions(self) -> list[PartitionWindow]:
        """The partitions that have nodes."""
        windows = ((node.name, node.content) for node in self.nodes())
        return [
            PartitionWindow(int(name.removeprefix(PARTITION)), window.start, window.size)
            for name, window in windows
            if isinstance(window, Window) and name.startswith(PARTITION)
        ]

    def node(self, inode: int) -> Node | None:
        """The node with this inode."""
        return self._nodes.get(inode)

    def directory(self, inode: int) -> Directory | None:
        """The directory with this inode."""
        node = self._nodes.get(inode)
        return node.content if node is not None and isinstance(node.content, Directory) else None

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """The entry `name` of a directory."""
        node = self._nodes.get(parent)
        if node is None or not isinstance(node.content, Directory):
            return None
        if name == b".":
            return node
        if name == b"..":
            return self._nodes[node.parent]
        return self._nodes.get(node.content.children.get(name, 0))

    def children(self, inode: int) -> Iterator[Node]:
        """The entries of a directory in order."""
        directory = self.directory(inode)
        if directory is not None:
            yield from (self._nodes[child] for child in directory.children.values())

    def nodes(self) -> Iterator[Node]:
        """All nodes, by inode."""
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)


def partition_windows(partitions: Iterable[Partition]) -> list[PartitionWindow]:
    """The partitions that get nodes: an extended one gets none, the logical ones in it do."""
    return [PartitionWindow(each.number, each.start, each.size) for each in partitions if not each.container]


def image_tree(
    size: int,
    *,
    writable: bool,
    information: Callable[[], bytes],
    partitions: Iterable[PartitionWindow] = (),
    snapshots: Iterable[tuple[bytes, KeptDisk]] = (),
    faces: Iterable[tuple[bytes, MadeFile]] = (),
) -> Tree:
    """The tree of an image: `disk`, its flat contents of `size` bytes, `part1` and so on, and `info.json`.

    The partitions are those of the start: what a guest makes of its table later shows in the next
    mount. The directory `snapshots` is there if the image has any. `faces` stand beside the disk.
    """
    tree = Tree()
    permissions = 0o600 if writable else 0o400
    tree.add(ROOT_INODE, b"disk", permissions, Window(0, size))
    for name, face in faces:
        tree.add(ROOT_INODE, name, 0o400, face)
    for partition in partitions:
        name = PARTITION + b"%d" % partition.number
        tree.add(ROOT_INODE, name, permissions, Window(partition.start, partition.size))
    tree.add(ROOT_INODE, b"info.json", 0o444, Document(information))
    folder: Node | None = None
    for name, disk in snapshots:
        if folder is None:
            folder = tree.add(ROOT_INODE, b"snapshots", 0o555, Directory())
        tree.add(folder.inode, name, 0o400, disk)
    return tree
