"""Opening a damaged image by what a scan of its file finds, laid over the file that stays as it is."""

from __future__ import annotations

from tapfs.driver import Format, SalvageableFormat, SalvageRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.files import LocalFiles


def lay_salvage_over(found: Format, files: LocalFiles, request: SalvageRequest) -> None:
    """Scan file 0 as an image of a format, and have the driver see the file with what was found.

    What was found is kept as `files.salvage`. Raises ImageError: unsupported for a format without a scan,
    invalid_format where nothing of an image was found.
    """
    if not isinstance(found, SalvageableFormat):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"no scan finds lost tables of {found.name} images: they have none, or their data does not say where on the"
            " disk it belongs, and could only be guessed",
            path=files.image.path,
            op="salvage",
            remedy="repair mends what has a copy, and convert --salvage takes what the tables still say; or say the"
            " format that the image had with {format=FMT}",
        )
    salvage = found.salvage(files.seen(0), request)
    files.salvage = salvage
    if salvage.patch:
        files.lay_over(salvage.patch)
