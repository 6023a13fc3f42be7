"""docs/json: each key of each JSON output is described, and real outputs are as described.

The fixtures that run commands compare every JSON output of the suite with its schema (tests/json_documents.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs.cli.main import COMMANDS
from tapfs.disk import description, json_text
from tapfs.disk.probe import format_named, format_names
from tapfs.errors import ErrorKind
from tapfs.fuse.registry import MountEntry
from tapfs.kernel.engine import Statistics
from tapfs.kernel.metrics import KINDS, Metric
from tapfs.kernel.nbd_server import NbdStatistics
from tapfs.kernel.ublk_server import UblkStatistics
from tapfs.kernel.vhost_device import VhostStatistics
from tapfs.kernel.xen_ring import XenStatistics
from tapfs.partitions import table
from tapfs.serving.served_disks import ServedDisk
from tapfs.xen.toolstack.attached_disks import AttachedDisk
from tests.json_documents import SCHEMAS, require_valid, require_valid_output, schema_named

Run = Callable[..., Any]
NAMES = sorted(path.name.removesuffix(".schema.json") for path in SCHEMAS.glob("*.schema.json"))


def schema(name: str) -> dict[str, Any]:
    return schema_named(name).schema  # type: ignore[return-value]


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that describes an object by its keys."""
    if isinstance(schema, dict):
        if "properties" in schema and "additionalProperties" in schema:
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_described_and_no_other_is_allowed(name: str) -> None:
    found = list(objects(schema(name)))
    assert found
    for each in found:
        assert each["description"]
        assert each["additionalProperties"] is False
        for key, value in each["properties"].items():
            assert "description" in value or "$ref" in value, key


@pytest.mark.parametrize("name", NAMES)
def test_every_document_but_that_of_qemu_has_a_version(name: str) -> None:
    document = schema(name)
    described = document.get("items", document)
    for each in described.get("oneOf", [described]):
        if name == "map":
            assert "version" not in each["properties"]
        else:
            assert each["properties"]["version"]["const"] == json_text.VERSION
            assert "version" in each["required"]


def test_every_command_that_prints_json_has_a_schema() -> None:
    with_json = {name for name in COMMANDS if "add_json_option" in Path(source_of(COMMANDS[name])).read_text()}
    assert with_json - {"repair"} == set(NAMES) - {"batch", "error", "package", "progress", "repair-plan", "map-bitmap"}


def source_of(module: str) -> str:
    from importlib.util import find_spec

    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


def keys(*path: str | int) -> set[str]:
    found: Any = schema(str(path[0]))
    for step in path[1:]:
        found = found[step]
    return set(found["properties"]) - {"version"}


def test_the_typed_results_have_the_keys_of_the_schemas() -> None:
    assert set(description.ImageInfo.__annotations__) == keys("info")
    assert set(description.ChainLink.__annotations__) == keys("info", "properties", "chain", "items")
    assert set(table.PartitionInfo.__annotations__) == keys("info", "$defs", "partition")
    assert set(table.FileSystemInfo.__annotations__) == keys("info", "$defs", "file_system")
    assert set(table.PartitionTableInfo.__annotations__) == keys("info", "properties", "partitions")
    attached = {field.name for field in fields(AttachedDisk)}
    assert attached == keys("list", "properties", "attached", "items")
    assert attached | {"operations"} == keys("stats", "items", "oneOf", 0)
    served = {field.name for field in fields(ServedDisk)}
    assert served == keys("list", "properties", "served", "items")
    assert served | {"operations"} == keys("stats", "items", "oneOf", 2)
    assert set(KINDS) == keys("stats", "$defs", "operations", "properties", "operations")
    assert {"requests", *Metric._fields} == keys("stats", "$defs", "metric")
    doors = (XenStatistics, UblkStatistics, NbdStatistics, VhostStatistics)
    counters = {*Statistics._fields, *(name for door in doors for name in door._fields)}
    assert counters == keys("stats", "$defs", "statistics") == keys("list", "$defs", "statistics")
    mount = {field.name for field in fields(MountEntry)} - {"process_start", "device", "server", "server_start"}
    assert mount | {"keeper", "alive", "bytes_read", "bytes_written"} == keys("list", "properties", "mounts", "items")


def test_every_kind_of_error_is_named() -> None:
    kinds = schema("error")["properties"]["error"]["properties"]["kind"]["enum"]
    assert set(kinds) == {*map(str, ErrorKind), "usage", "interrupted", "bug"}


def test_the_details_of_each_format_of_ours_are_described() -> None:
    ours = [name for name in format_names() if type(format_named(name)).__module__.startswith("tapfs.")]
    assert {f"{name}_details" for name in ours} <= set(schema("info")["$defs"])
    assert {part["if"]["properties"]["format"]["const"] for part in schema("info")["allOf"]} == set(ours)


@pytest.mark.parametrize("options", [{}, {"blktap": "on"}])
def test_real_outputs_are_as_described(tapfs: Run, tmp_path: Path, sample: Path, options: dict[str, str]) -> None:
    """The fixture compares them; here are some of every command."""
    image, overlay = tmp_path / "a.qcow", tmp_path / "overlay.qcow"
    api.convert(sample, image, format="raw", target_format="qcow", options=options)
    api.create(overlay, "qcow", backing=str(image), backing_format="qcow", options=options)
    for path in (sample, image, overlay):
        found = json.loads(tapfs("info", "--json", path).out)
        assert found["version"] == 1
        assert "partitions" in found
    assert len(json.loads(tapfs("info", "--json", "--backing-chain", overlay).out)) == 2
    for words in (("map",), ("check",), ("repair",), ("repair", "--dry-run")):
        assert tapfs(*words, "--json", image).code == 0
    assert tapfs("compare", "--json", "-f", "raw", sample, image).code == 0
    for words in (("formats",), ("list",)):
        assert tapfs(*words, "--json").code == 0
    assert json.loads(tapfs("info", "--json", tmp_path / "missing").out)["error"]["kind"] == "not_found"


def test_progress_lines_are_as_described(tapfs_process: Run, sample: Path, tmp_path: Path) -> None:
    words = ("convert", "--progress", "json", "-f", "raw", "-O", "qcow", sample, tmp_path / "a.qcow")
    for line in tapfs_process(*words).err.splitlines():
        require_valid("progress", json.loads(line))


def test_a_key_without_a_description_would_fail(sample: Path, tapfs: Run) -> None:
    found = json.loads(tapfs("info", "--json", sample).out)
    for wrong in (found | {"new": 1}, found | {"details": {"new": 1}}, {k: v for k, v in found.items() if k != "path"}):
        with pytest.raises(AssertionError, match=r"info\.schema\.json"):
            require_valid_output(["info", "--json", "x"], json.dumps(wrong))


def test_images_of_every_era_are_as_described(tapfs: Run, blktap_images: dict[str, Any]) -> None:
    assert blktap_images
    for name, image in blktap_images.items():
        backing = [] if image.backing is None else ["--backing", image.backing, "--backing-format", "raw"]
        assert tapfs("info", "--json", *backing, image.path).code == 0, name
        assert tapfs("check", "--json", image.path).code in (0, 2, 3), name
