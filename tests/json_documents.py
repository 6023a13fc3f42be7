"""Every JSON document that a test has a command print is compared with its schema in docs/json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent.parent / "docs/json"


@cache
def schema_named(name: str) -> Draft202012Validator:
    """The validator of docs/json/NAME.schema.json."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def require_valid(name: str, document: Any) -> None:
    """Fail for a key that the schema does not describe, one that it requires and is missing, or a wrong value."""
    problems = [f"{error.json_path}: {error.message}" for error in schema_named(name).iter_errors(document)]
    assert not problems, f"docs/json/{name}.schema.json: {problems}"


def require_valid_output(words: Sequence[str], out: str) -> None:
    """The same for what a command printed, if that was to be JSON and is whole."""
    options = words[: words.index("--")] if "--" in words else words
    if "--json" not in options and "--output=json" not in options:
        return
    try:
        document = json.loads(out)
    except ValueError:  # nothing, or a document that an error cut short
        return
    name = options[0]
    if isinstance(document, dict) and "error" in document:
        name = "error"
    elif name == "repair":
        name = "repair-plan" if {"-n", "--dry-run"} & set(options) else "check"
    elif name == "info" and isinstance(document, dict) and "package" in document:
        name = "package"
    elif "--batch" in options:
        name = "batch"
    elif name == "map" and "--bitmap" in options:
        name = "map-bitmap"
    documents = document if name == "info" and isinstance(document, list) else [document]
    for each in documents:
        require_valid(name, each)
