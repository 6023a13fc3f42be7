"""Records are the standard library's in all but what they load: each test runs over both.

Constructors of tapfs go through the fields at first, and are compiled when they have been called some times.
"""
# What a pattern takes out of an object of any class:
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import typing
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tapfs import records

SOURCE = '''
from __future__ import annotations

@dataclass(frozen=True, slots=True)
class Frozen:
    """A place."""

    number: int
    word: str = "one"
    items: list[int] = field(default_factory=list)
    secret: bytes = field(default=b"", repr=False)

    @property
    def doubled(self):
        return 2 * self.number


@dataclass(slots=True)
class Changing:
    number: int
    made: int = field(default=7, init=False)

    def __post_init__(self):
        self.made += self.number


@dataclass(slots=True, eq=False)
class Itself:
    number: int = 1


@dataclass
class Plain:
    number: int
    items: list[int] = field(default_factory=list)

    def __repr__(self):
        return "plain"


class Pair(NamedTuple):
    """Two numbers."""

    first: int
    second: int = 2

    @property
    def sum(self):
        return self.first + self.second
'''


@pytest.fixture(params=["tapfs", "compiled", "standard"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The classes of SOURCE, in a module of their own so that they can be pickled."""
    module = ModuleType("records_under_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    standard = SimpleNamespace(
        dataclass=dataclasses.dataclass,
        field=dataclasses.field,
        replace=dataclasses.replace,
        NamedTuple=typing.NamedTuple,
    )
    if request.param == "compiled":
        monkeypatch.setattr(records, "_FEW", 0)
    from_where = standard if request.param == "standard" else records
    for name in records.__all__:
        setattr(module, name, getattr(from_where, name))
    exec(SOURCE, module.__dict__)  # noqa: S102
    return module


def test_fields_are_given_by_place_by_name_or_not_at_all(made: Any) -> None:
    record = made.Frozen(1, secret=b"key")
    assert (record.number, record.word, record.items, record.secret, record.doubled) == (1, "one", [], b"key", 2)
    assert made.Frozen(2).items is not record.items
    assert made.Changing(1).made == 8
    assert made.Plain(3).items == []
    assert (made.Frozen.__doc__, made.Frozen.__match_args__) == ("A place.", ("number", "word", "items", "secret"))


@pytest.mark.parametrize("arguments", [(), (1, "a", [], b"", 5)])
def test_too_few_or_too_many_fields_are_a_mistake(made: Any, arguments: tuple[object, ...]) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=r"argument"):
            made.Frozen(*arguments)
    with pytest.raises(TypeError, match=r"unknown"):
        made.Frozen(1, unknown=2)
    with pytest.raises(TypeError):
        made.Changing(1, made=2)


def test_records_are_equal_by_their_fields_and_class(made: Any) -> None:
    assert made.Frozen(1) == made.Frozen(1) != made.Frozen(2)
    assert made.Frozen(1) != (1, "one", [], b"")
    assert made.Itself() != made.Itself()
    assert hash(made.Frozen(1, items=())) == hash(made.Frozen(1, items=()))
    with pytest.raises(TypeError):
        hash(made.Changing(1))
    assert isinstance(hash(made.Itself()), int)


def test_a_repr_leaves_out_secrets(made: Any) -> None:
    assert repr(made.Frozen(1, secret=b"key")) == "Frozen(number=1, word='one', items=[])"
    assert repr(made.Plain(1)) == "plain"


def test_only_the_fields_of_what_is_not_frozen_change(made: Any) -> None:
    changing, frozen = made.Changing(1), made.Frozen(1)
    changing.number = 5
    assert changing.number == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.number = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        del frozen.number
    with pytest.raises(AttributeError):
        changing.unknown = 5
    assert not hasattr(frozen, "__dict__")


def test_a_replaced_field_leaves_the_others(made: Any) -> None:
    for replace in (made.replace, dataclasses.replace):
        assert replace(made.Frozen(1, "two"), number=5) == made.Frozen(5, "two")
    with pytest.raises(TypeError):
        made.replace(made.Frozen(1), unknown=2)


def test_the_standard_library_knows_the_fields(made: Any) -> None:
    assert [each.name for each in dataclasses.fields(made.Frozen)] == ["number", "word", "items", "secret"]
    assert dataclasses.asdict(made.Changing(1)) == {"number": 1, "made": 8}
    assert dataclasses.is_dataclass(made.Plain(1))
    assert [each.type for each in dataclasses.fields(made.Changing)] == ["int", "int"]


def pickled(record: object) -> object:
    return pickle.loads(pickle.dumps(record))  # noqa: S301


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_are_equal(made: Any, copied: Any) -> None:
    for record in (made.Frozen(1, "two"), made.Changing(3), made.Plain(4), made.Pair(5)):
        assert copied(record) == record
        assert type(copied(record)) is type(record)


def test_a_standard_class_derives_from_a_record(made: Any) -> None:
    @dataclasses.dataclass(frozen=True)
    class Derived(made.Frozen):  # type: ignore[misc]
        more: int = 0

    derived = Derived(1, more=3)
    assert (derived.number, derived.word, derived.more) == (1, "one", 3)
    assert repr(derived).endswith("Derived(number=1, word='one', items=[], more=3)")
    assert copy.copy(derived) == derived


def _parts(made: Any, record: object) -> Any:
    match record:
        case made.Frozen(number, word=word) | made.Pair(number, word):
            parts: Any = (number, word)
            return parts
        case _:
            return None


def test_a_record_takes_part_in_a_match(made: Any) -> None:
    assert _parts(made, made.Frozen(1, "two")) == (1, "two")
    assert _parts(made, made.Pair(3)) == (3, 2)
    assert _parts(made, 1) is None


def test_a_named_tuple_is_a_tuple(made: Any) -> None:
    pair = made.Pair(1)
    assert pair == (1, 2)
    assert (pair.first, pair.second, pair.sum, made.Pair(second=4, first=3).sum) == (1, 2, 3, 7)
    assert repr(pair) == "Pair(first=1, second=2)"
    assert (made.Pair._fields, made.Pair._field_defaults) == (("first", "second"), {"second": 2})
    assert pair._asdict() == {"first": 1, "second": 2}
    assert (pair._replace(first=5), made.Pair._make([6, 7])) == ((5, 2), (6, 7))
    assert made.Pair.__doc__ == "Two numbers."
    with pytest.raises(TypeError):
        made.Pair()
    with pytest.raises(AttributeError):
        pair.first = 2


def test_records_load_nothing_of_what_they_stand_for() -> None:
    script = "import sys\nimport tapfs.geometry, tapfs.extent, tapfs.format\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert not {"dataclasses", "inspect", "ast"} & set(done.stdout.split())


def test_a_constructor_that_is_called_often_is_compiled(made: Any) -> None:
    for kind, arguments in ((made.Frozen, (1, "a")), (made.Changing, (1,)), (made.Pair, (1,))):
        assert len({repr(kind(*arguments)) for _ in range(100)}) == 1
    assert made.Frozen.__init__.__code__.co_filename == "<string>"
