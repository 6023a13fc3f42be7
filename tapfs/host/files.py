"""The host files of one image: the image itself, number 0, and the files that it names, in the order of opening."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.confine import LEAVING
from tapfs.host.file import LocalFile
from tapfs.host.gate import ORDINARY, Gate
from tapfs.host.lock import Sharing
from tapfs.host.remote.address import Address
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.host.window import WindowFile
from tapfs.host_files import HostFile, NumberedFile, Role
from tapfs.plan import Plan, Write
from tapfs.salvage import Salvage

if TYPE_CHECKING:
    from tapfs.host.patched import PatchedFile

#: No host file is longer, in bytes.
MAX_HOST_BYTES = 1 << 63


class LocalFiles:
    """The open files of one image: a `tapfs.host_files.FurtherFiles` that owns and closes them.

    A further file is opened as the image is: writable if the image is and the role allows it, with the same sharing,
    direct I/O and mark of requests. `gate` judges its name. `given` holds files that are open already, by the names
    that the image gives them; they are taken over. `remote` is for the files of an image that lies elsewhere.
    """

    def __init__(
        self,
        image: LocalFile,
        *,
        gate: Gate = ORDINARY,
        sharing: Sharing = Sharing.EXCLUSIVE,
        given: Mapping[str, LocalFile] | None = None,
        remote: RemoteOptions = USUAL,
    ) -> None:
        self._files = [image]
        self._numbers: dict[str, int] = {}
        self._descriptions: set[int] = set()
        self._gate = gate
        self._sharing = sharing
        self._remote = remote
        self._given = dict(given or {})
        self._patches: dict[int, PatchedFile] = {}
        self._patch = Plan()
        #: Whether a journal was replayed in these files when they were opened for writing.
        self.replayed = False
        #: Whether drivers map what the ends of the files cut (`OpenRequest.cut`).
        self.cut = False
        #: What a scan of file 0 has found, if the image is opened by that (`tapfs.disk.salvaging`).
        self.salvage: Salvage | None = None

    @property
    def image(self) -> LocalFile:
        """File 0, the one that the user or the child named."""
        return self._files[0]

    @property
    def identities(self) -> tuple[tuple[int, int], ...]:
        """Device and inode of each file, in the order of their numbers."""
        return tuple(file.identity for file in self._files)

    @property
    def places(self) -> set[tuple[tuple[int, int], int]]:
        """Where the bytes of each file lie (`LocalFile.place`), but for descriptions, which layers may share."""
        return {file.place for number, file in enumerate(self._files) if number not in self._descriptions}

    @property
    def names(self) -> Mapping[str, int]:
        """The numbers of the further files by the names that the image gives them."""
        return self._numbers

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[LocalFile]:
        return iter(self._files)

    def __getitem__(self, number: int) -> LocalFile:
        return self._files[number]

    def open(self, name: str, role: Role) -> NumberedFile:
        """See `tapfs.host_files.FurtherFiles.open`."""
        if name not in self._numbers:
            self._numbers[name] = self._opened(name, role)
            if role is Role.DESCRIPTION:
                self._descriptions.add(self._numbers[name])
        number = self._numbers[name]
        file = self._files[number]
        if self._writes(role) and not file.writable:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"names {name} once to be written and once to be only read",
                path=self.image.path,
                op="open the files of the image",
            )
        return NumberedFile(number, self.seen(number))

    def seen(self, number: int) -> HostFile:
        """A file as the driver is to read it: with what was laid over it."""
        return self._patches.get(number, self._files[number])

    @property
    def patched(self) -> bool:
        """Whether anything was laid over the files."""
        return bool(self._patches)

    @property
    def patch(self) -> Plan:
        """The plan that was laid over the files; empty if none was."""
        return self._patch

    def lay_over(self, plan: Plan) -> None:
        """Have drivers see the files as the plan would leave them, over what was laid before; it is not executed."""
        from tapfs.host.patched import patched_files  # few images need it

        self._patch = Plan((*self._patch.stages, *plan.stages), plan.mends)
        self._patches = patched_files(self._files, self._patch)

    def hidden_ranges(self, number: int) -> list[tuple[int, int]]:
        """``(start, end)`` of what of a file the drivers see otherwise than the engine, which reads the file itself.

        These are the ranges that were laid over, and all that lies behind the real end of a file that was lengthened.
        """
        if number not in self._patches:
            return []
        end = self._files[number].size()
        steps = (step for stage in self._patch.stages for step in stage if isinstance(step, Write))
        inside = [step for step in steps if step.file == number and step.host_offset < end]
        return [*((step.host_offset, step.host_offset + len(step.data)) for step in inside), (end, MAX_HOST_BYTES)]

    def again(self, names: Mapping[str, LocalFile], image: LocalFile) -> Self:
        """The same image on other descriptors of its files: `image` for file 0, the rest by the names in `names`."""
        return type(self)(image, gate=self._gate, sharing=self._sharing, given=names, remote=self._remote)

    def allocated_size(self) -> int:
        """Bytes that the hosts have allocated for the files."""
        return sum(file.allocated_size() for file in self._files)

    def close(self) -> None:
        """Close every file; the locks go with them. Closing twice is allowed."""
        for file in (*self._files, *self._given.values()):
            file.close()
        self._given.clear()

    def _opened(self, name: str, role: Role) -> int:
        """The number of a file by a name that is new; one that is open already under another name keeps its own."""
        given = self._given.pop(name, None)
        if given is not None:
            self._files.append(given)
            return len(self._files) - 1
        if isinstance(self.image, WindowFile):
            self._files.append(self.image.open_beside(name))
            return len(self._files) - 1
        own = Address.parse(self.image.path)
        if own is not None:
            return self._opened_elsewhere(own.joined(name), name, role)
        folder = os.path.dirname(self.image.path)
        path = os.path.join(folder, name)
        try:
            found = self._gate.look_up_further(path, folder=folder)
        except ImageError as error:
            raise self._explained(error, name) from error
        try:
            status = os.fstat(found)
            if (status.st_dev, status.st_ino) in self.identities:
                return self.identities.index((status.st_dev, status.st_ino))
            file = LocalFile.open_found(
                found,
                path,
                writable=self._writes(role),
                sharing=self._sharing,
                direct=self.image.direct,
                request_owner=self.image.request_owner,
            )
        finally:
            os.close(found)
        self._files.append(file)
        return len(self._files) - 1

    def _opened_elsewhere(self, address: Address, name: str, role: Role) -> int:
        """The number of a file of an image that lies elsewhere, as the file does then."""
        from tapfs.host.location import locate  # it stands above this module

        if address.identity in self.identities:
            return self.identities.index(address.identity)
        try:
            self._gate.judge_address(address)
        except ImageError as error:
            raise ImageError(
                ErrorKind.DENIED,
                f"its file {name} {self._gate.refusal(address)}",
                path=self.image.path,
                op="open the files of the image",
                remedy=f"if you trust the image with it say {{backing_root={address.folder}}}",
            ) from error
        self._files.append(locate(address.text).open(writable=self._writes(role), remote=self._remote))
        return len(self._files) - 1

    def _explained(self, error: ImageError, name: str) -> ImageError:
        """The error of a name that leads to no file, so that it says which image has that name."""
        if error.op == LEAVING:
            problem = self._gate.refusal()
            remedy = "if you trust the image name a folder that holds both: {backing_root=DIR}"
        elif error.kind is ErrorKind.NOT_FOUND:
            problem, remedy = "is missing", "put it beside the image, or correct its name in the image"
        else:
            return error
        op = "open the files of the image"
        return ImageError(error.kind, f"its file {name} {problem}", path=self.image.path, op=op, remedy=remedy)

    def _writes(self, role: Role) -> bool:
        return self.image.writable and role not in {Role.READ_ONLY_DATA, Role.DESCRIPTION}


def all_identities(images: Sequence[LocalFiles]) -> set[tuple[int, int]]:
    """Device and inode of every file of several images."""
    return {identity for files in images for identity in files.identities}
