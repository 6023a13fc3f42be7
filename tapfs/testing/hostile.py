"""Images that were damaged at random: a driver raises ImageError, or its answers keep to the contract."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from types import FrameType

from tapfs.driver import Checkable, Driver
from tapfs.errors import ImageError
from tapfs.plan import Discard, Grow, Plan, Write
from tapfs.testing.laws import check_map
from tapfs.testing.model import MemoryFile
from tapfs.testing.processor_time import bounded
from tapfs.testing.subject import Subject, ViolationError, require

#: Numbers at the edges of what fields can hold, and of what sizes and flags mean something.
EDGES = (
    *(0, 1, 7, 8, 47, 48, 511, 512, 4095, 4096, 65536),
    *((1 << bits) - less for bits in (31, 32, 62, 63, 64) for less in (0, 1)),
    *(1 << 63 | 4096, 1 << 63 | 1 << 51 | 100, 1 << 62 | 1 << 54 | 512),
)

#: Plans of a repair that would make the file longer than this are not carried out in memory.
_LONGEST_FILE = 64 << 20

#: Seconds of processor time for one image. Ours take hundredths; a size that nobody has bounded takes for ever.
IMAGE_SECONDS = 20.0


def damage(image: bytearray, choice: random.Random) -> None:
    """Change a byte, a bit, a field or an entry of an image, or cut its end off."""
    what = choice.random()
    if what < 0.3:
        image[choice.randrange(min(512, len(image)))] = choice.randrange(256)
    elif what < 0.8 and len(image) > 8:
        # A header's field, or an entry of a table: most of both are near the start.
        number = choice.choice([*EDGES, choice.randrange(len(image)), choice.randrange(1 << 20) * 512])
        width = choice.choice([2, 4, 8, 8])
        end = choice.choice([64, 512, 40000])
        at = choice.randrange(min(end, len(image) - 8)) // width * width
        field = (number % (1 << 8 * width)).to_bytes(width, "big" if choice.random() < 0.6 else "little")
        image[at : at + width] = field
    elif what < 0.92:
        image[choice.randrange(len(image))] ^= 1 << choice.randrange(8)
    elif len(image) > 5000:
        del image[choice.randrange(5000, len(image)) :]


def use(subject: Subject, image: MemoryFile, choice: random.Random) -> None:
    """Everything that a driver is asked for, in each way of opening.

    Raises what is no ImageError, and ViolationError where an answer breaks the contract.
    """
    for writable, lenient in ((False, False), (True, False), (False, True)):
        # Who only reads leaves the image as it is.
        file = image.copy() if writable or lenient else image
        try:
            driver = subject.opened(file, writable=writable, lenient=lenient)
        except ImageError:
            continue
        uses: list[Callable[[], object]] = [driver.details, partial(_map, driver, choice)]
        if lenient and isinstance(driver, Checkable):
            uses += [driver.check, partial(_repair, driver, file, subject)]
        for use in uses:
            try:
                use()
            except ImageError:
                continue


def _map(driver: Driver, choice: random.Random) -> None:
    geometry = driver.geometry
    require(0 <= geometry.virtual_size < 1 << 63, f"the disk has {geometry.virtual_size} bytes")
    require(geometry.granule > 0 and geometry.map_unit % geometry.granule == 0, "a map unit is not whole granules")
    for _ in range(4):
        offset = choice.randrange(max(1, geometry.virtual_size))
        length = min(choice.choice([1, geometry.granule, geometry.map_unit]), geometry.virtual_size - offset)
        if length > 0:
            check_map(driver, offset, length)


def _repair(driver: Checkable, file: MemoryFile, subject: Subject) -> None:
    before = driver.check().corruptions
    plans = list(driver.repair())
    if not all(map(_is_small, plans)):
        return
    file.apply_all(plans)
    again = subject.opened(file, lenient=True)
    if isinstance(again, Checkable):
        after = again.check().corruptions
        require(after <= before, f"a repair left {after} corruptions where there were {before}")


def _is_small(plan: Plan) -> bool:
    ends: list[int] = []
    for stage in plan.stages:
        for step in stage:
            match step:
                case Write():
                    ends.append(step.host_offset + len(step.data))
                case Grow():
                    ends.append(step.size)
                case Discard():
                    ends.append(step.host_offset)
                case _:
                    pass
    return max(ends, default=0) <= _LONGEST_FILE


def _endless(number: int, frame: FrameType | None) -> ViolationError:
    place = "" if frame is None else f", and is at {frame.f_code.co_filename}:{frame.f_lineno}"
    return ViolationError(
        f"image {number} takes more than {IMAGE_SECONDS:g} s of processor time{place}: "
        "bound what the file says by what the file has"
    )


def run(subject: Subject, seed: int, images: int) -> str:
    """That many damaged images. Raises ViolationError; the result says what was done."""
    choice = random.Random(seed)  # noqa: S311  a test repeats itself
    seeds = subject.seeds(choice)
    require(bool(seeds), "there is no image to damage: name some, the format makes none")
    for number in range(images):
        image = choice.choice(seeds).copy()
        for _ in range(choice.choice([1, 1, 2, 4, 10])):
            damage(image.numbered(choice.randrange(1 + len(image.further))).data, choice)
        try:
            with bounded(IMAGE_SECONDS, partial(_endless, number)):
                use(subject, image, choice)
        except (ImageError, ViolationError):
            raise
        except Exception as error:
            raise ViolationError(f"image {number}: {type(error).__name__}, which is no ImageError: {error}") from error
    return f"{images} images"
