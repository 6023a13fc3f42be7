"""Records: classes of named fields, made without what the standard library loads and compiles for them.

`dataclass`, `field`, `replace` and `NamedTuple` are to type checkers those of the standard library, and behave as they
do. `dataclasses` loads `inspect` and compiles six functions for each class: a third of the start of a command.
Here classes share their functions. Only the constructor is a class's own, and it is compiled for a class that has
been made `_FEW` times: to compile it takes as long as so many calls of one that goes through the fields.
`dataclasses.fields`, `replace` and `asdict` take such objects, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_MISSING = object()
_FEW = 30
#: The descriptor of a named tuple's field; `collections` has no public name for it.
_field_getter: Any = __import__("_collections")._tuplegetter  # noqa: SLF001


class _Field:
    """A field that is more than an annotation and a default."""

    __slots__ = ("default", "factory", "init", "name", "repr")

    def __init__(self, default: object, factory: object, *, init: bool, in_repr: bool) -> None:
        self.name = ""
        self.default = default
        self.factory = factory
        self.init = init
        self.repr = in_repr


def _field(
    *,
    default: object = _MISSING,
    default_factory: object = _MISSING,
    init: bool = True,
    repr: bool = True,  # noqa: A002
) -> _Field:
    return _Field(default, default_factory, init=init, in_repr=repr)


# ---- classes with slots


def _dataclass(cls: type | None = None, *, frozen: bool = False, slots: bool = False, eq: bool = True) -> object:
    if frozen and not slots:
        raise TypeError("a frozen record has slots")

    def decorate(cls: type) -> type:
        return _record_class(cls, frozen=frozen, slots=slots, eq=eq)

    return decorate if cls is None else decorate(cls)


def _record_class(cls: type, *, frozen: bool, slots: bool, eq: bool) -> type:
    namespace = dict(vars(cls))
    fields = [_field_of(name, namespace) for name in namespace.get("__annotations__", ())]
    names = tuple(each.name for each in fields)
    own: dict[str, object] = {"__match_args__": tuple(each.name for each in fields if each.init)}
    own["__init__"] = _constructor_of(fields, frozen=frozen, calls_post_init="__post_init__" in namespace)
    own["__repr__"] = _repr
    if eq:
        own |= {"__eq__": _eq, "__hash__": _hash if frozen else None}
    own = {name: value for name, value in own.items() if name == "__hash__" or name not in namespace}
    if namespace.get("__hash__") is not None:
        own.pop("__hash__", None)
    own |= {"_record_fields": fields, "_record_names": names, "_record_options": {"frozen": frozen, "eq": eq}}
    own |= {name: _OfStandard(name) for name in ("__dataclass_fields__", "__dataclass_params__")}
    if frozen:
        own |= {"__setattr__": _refuse_change, "__delattr__": _refuse_change}
    if slots:
        for name in (*names, "__dict__", "__weakref__"):
            namespace.pop(name, None)
        own |= {"__slots__": names, "__getstate__": _getstate, "__setstate__": _setstate}
        made = type(cls)(cls.__name__, cls.__bases__, namespace | own)
        made.__qualname__ = cls.__qualname__
        return made
    for name in names:
        if isinstance(namespace.get(name), _Field):
            delattr(cls, name)
    for name, value in own.items():
        setattr(cls, name, value)
    return cls


def _field_of(name: str, namespace: Mapping[str, object]) -> _Field:
    said = namespace.get(name, _MISSING)
    found = said if isinstance(said, _Field) else _Field(said, _MISSING, init=True, in_repr=True)
    found.name = name
    return found


def _constructor_of(fields: list[_Field], *, frozen: bool, calls_post_init: bool) -> Callable[..., None]:
    """An `__init__` that puts the compiled one into its place when it has been called some times."""
    calls = 0

    def __init__(self: Any, *values: object, **named: object) -> None:  # noqa: N807  it is one
        nonlocal calls
        calls += 1
        given = _given(fields, values, named) if calls < _FEW else None
        if given is not None:
            for each, value in zip(fields, given, strict=True):
                object.__setattr__(self, each.name, value)
            if calls_post_init:
                self.__post_init__()
            return
        cls = next(each for each in type(self).__mro__ if each.__dict__.get("__init__") is __init__)
        compiled = _compiled(cls, fields, frozen=frozen, calls_post_init=calls_post_init)
        cls.__init__ = compiled  # type: ignore[misc]
        compiled(self, *values, **named)

    return __init__


def _given(fields: list[_Field], values: tuple[object, ...], named: dict[str, object]) -> list[object] | None:
    """A value for each field; None where the arguments are not those of the constructor, which then says so."""
    found = list[object]()
    by_place = by_name = 0
    for each in fields:
        if each.init and by_place < len(values):
            found.append(values[by_place])
            by_place += 1
        elif each.init and each.name in named:
            found.append(named[each.name])
            by_name += 1
        elif each.factory is not _MISSING:
            factory: Any = each.factory
            found.append(factory())
        elif each.default is not _MISSING:
            found.append(each.default)
        else:
            return None
    return found if (by_place, by_name) == (len(values), len(named)) else None


def _compiled(cls: type, fields: list[_Field], *, frozen: bool, calls_post_init: bool) -> Callable[..., None]:
    known: dict[str, object] = {"missing": _MISSING}
    parameters, lines = ["self"], list[str]()
    for each in fields:
        name, default, value = each.name, f"default_{each.name}", each.name
        if each.factory is not _MISSING:
            known[f"make_{name}"], known[default] = each.factory, _MISSING
            value = f"make_{name}() if {name} is missing else {name}" if each.init else f"make_{name}()"
        elif each.default is not _MISSING:
            known[default] = each.default
            value = name if each.init else default
        if each.init:
            parameters.append(f"{name}={default}" if default in known else name)
        if frozen:  # the descriptor of the slot is no attribute that can be refused
            known[f"set_{name}"] = cls.__dict__[name].__set__
        lines.append(f" set_{name}(self, {value})" if frozen else f" self.{name} = {value}")
    if calls_post_init:
        lines.append(" self.__post_init__()")
    source = f"def __init__({', '.join(parameters)}):\n" + "\n".join(lines or [" pass"])
    made: dict[str, Any] = {}
    exec(source, known, made)  # noqa: S102  as the standard library makes them: names of fields, and nothing from outside
    compiled: Callable[..., None] = made["__init__"]
    compiled.__qualname__ = f"{cls.__qualname__}.__init__"
    return compiled


def _values(record: Any) -> tuple[object, ...]:
    return tuple([getattr(record, name) for name in record._record_names])  # noqa: SLF001


def _eq(self: Any, other: object) -> bool:
    return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _repr(self: Any) -> str:
    shown = [f"{each.name}={getattr(self, each.name)!r}" for each in self._record_fields if each.repr]
    return f"{self.__class__.__qualname__}({', '.join(shown)})"


def _getstate(self: Any) -> dict[str, object]:
    # A class derived from this one may have a __dict__.
    return dict(zip(self._record_names, _values(self), strict=True)) | getattr(self, "__dict__", {})


def _setstate(self: Any, state: Mapping[str, object]) -> None:
    for name, value in state.items():
        object.__setattr__(self, name, value)


def _refuse_change(_: object, name: str, *__: object) -> NoReturn:
    from dataclasses import FrozenInstanceError  # only mistakes pay for it

    raise FrozenInstanceError(f"cannot change field {name!r}")


def _replace(record: Any, **changes: object) -> Any:
    for each in record._record_fields:  # noqa: SLF001
        if each.init:
            changes.setdefault(each.name, getattr(record, each.name))
    return record.__class__(**changes)


class _OfStandard:
    """What `dataclasses` keeps in classes of its own; made when asked for, as when such a class derives from ours."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, record: object, cls: Any) -> object:
        import dataclasses

        annotations: dict[str, Any] = {}
        bases: tuple[type, ...] = cls.__mro__
        for base in reversed(bases):
            own: dict[str, Any] = dict(vars(base))
            annotations |= own.get("__annotations__", {})
        options: list[tuple[str, Any, Any]] = []
        for each in cls._record_fields:
            standard: Any = {"init": each.init, "repr": each.repr}
            if each.default is not _MISSING:
                standard["default"] = each.default
            if each.factory is not _MISSING:
                standard["default_factory"] = each.factory
            options.append((each.name, annotations[each.name], dataclasses.field(**standard)))
        likeness = dataclasses.make_dataclass(cls.__name__, options, **cls._record_options)
        return getattr(likeness, self._name)


# ---- named tuples


class _Tuple(tuple[Any, ...]):
    """The functions that all named tuples share."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()

    @classmethod
    def _make(cls, values: Iterable[Any]) -> Any:
        make: Any = cls
        return make(*values)

    def _replace(self, **changes: object) -> Any:
        return self.__class__(**(dict(zip(self._fields, self, strict=True)) | changes))

    def _asdict(self) -> dict[str, object]:
        return dict(zip(self._fields, self, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join([f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True)])
        return f"{self.__class__.__name__}({shown})"

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)


class _TupleMaker(type):
    """The metaclass of the base of named tuples; the classes themselves are ordinary ones."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        names: tuple[str, ...] = tuple(namespace.get("__annotations__", ()))
        defaults = {each: namespace[each] for each in names if each in namespace}
        own: dict[str, Any] = {each: _field_getter(place, None) for place, each in enumerate(names)}
        own |= {"__slots__": (), "__match_args__": names, "_fields": names, "_field_defaults": defaults}
        own["__new__"] = _tuple_constructor(names, defaults)
        others = tuple(_Tuple if type(each) is _TupleMaker else each for each in bases)
        return type(name, others, namespace | own)


def _tuple_constructor(names: tuple[str, ...], defaults: Mapping[str, object]) -> Any:
    """A `__new__` that puts the compiled one into its place when it has been called some times."""
    calls = 0

    def __new__(cls: Any, *values: object, **named: object) -> Any:  # noqa: N807  it is one
        nonlocal calls
        calls += 1
        if calls < _FEW and len(values) == len(names) and not named:
            return _Tuple.__new__(cls, values)
        if calls < _FEW:
            found = [*values, *(named.get(name, defaults.get(name, _MISSING)) for name in names[len(values) :])]
            by_name = sum(name in named for name in names[len(values) :])
            complete = len(found) == len(names) and by_name == len(named)
            if complete and not any(value is _MISSING for value in found):
                return _Tuple.__new__(cls, found)
        parameters = [f"{name}=default_{name}" if name in defaults else name for name in names]
        listed = "".join(f"{name}, " for name in names)
        known: dict[str, Any] = {
            "new": _Tuple.__new__,
            **{f"default_{name}": value for name, value in defaults.items()},
        }
        source = f"lambda cls_, {', '.join(parameters)}: new(cls_, ({listed}))"
        compiled: Any = eval(source, known)  # noqa: S307  as the standard library makes them: names of fields only
        compiled.__name__ = "__new__"
        owner = next(each for each in cls.__mro__ if "_field_defaults" in each.__dict__)
        owner.__new__ = compiled
        return compiled(cls, *values, **named)

    return __new__


class _NamedTuple:
    """What a class names as its base to be a named tuple."""

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type]:
        return (_TUPLE_BASE,)


_TUPLE_BASE: type = type.__new__(_TupleMaker, "NamedTuple", (), {})

if TYPE_CHECKING:
    from dataclasses import dataclass, field, replace
    from typing import NamedTuple
else:
    dataclass, field, replace, NamedTuple = _dataclass, _field, _replace, _NamedTuple()

__all__ = ["NamedTuple", "dataclass", "field", "replace"]
