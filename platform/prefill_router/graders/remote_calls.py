"""Remote calls between the judge's process and the code's process: values travel as plain data, objects as numbers.

The judge calls the functions that an answer's code defines. It receives either data, from which it builds its own
objects, or the number of an object that stays in the code's process. That becomes a `Remote`, which equals no data,
whatever the object's own `__eq__` says. The harness imports this module from its own folder, without the package.
"""

from __future__ import annotations

import builtins
import json
import operator
from collections.abc import Callable, Iterator
from os import read, write
from typing import Any

_HEAD_BYTES = 8
_CHUNK_BYTES = 1 << 16
_MAX_BYTES = 64 << 20
_SMALL_INT = 1 << 62
_BUILTINS = dict(vars(builtins))
_ERRORS = {name: kind for name, kind in _BUILTINS.items() if isinstance(kind, type) and issubclass(kind, BaseException)}
_NAMES = {id(value): name for name, value in _BUILTINS.items() if callable(value)}
_MUTABLE = (list, dict, set)
_SEQUENCES: dict[str, Callable[[Any], Any]] = {"t": tuple, "s": set, "z": frozenset}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
_BINARY = (*_ARITHMETIC, "lshift", "rshift", "lt", "le", "gt", "ge")
_UNARY: dict[str, Callable[..., Any]] = {
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "abs": abs,
    "int": int,
    "float": float,
    "next": next,
}
# Types of the standard library whose values are rebuilt from their parts.
_PARTS: dict[tuple[str, str], Callable[[Any], list[Any]]] = {
    ("decimal", "Decimal"): lambda value: [str(value)],
    ("fractions", "Fraction"): lambda value: [value.numerator, value.denominator],
    ("datetime", "date"): lambda value: [value.year, value.month, value.day],
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
}


class Gone(BaseException):
    """The other process has ended. Not an Exception, so that no test catches it."""


class Unportable(TypeError):  # noqa: N818 - describes a value
    """A value that cannot be sent to the other process."""


class Peer:
    """One end of a connection. Both ends make calls, and answer calls while they wait for a return value.

    `shares_all` lets the other end do everything with objects that stay here; otherwise it can only call them.
    """

    def __init__(self, reads: int, writes: int, *, shares_all: bool) -> None:
        self._reads, self._writes, self._shares_all = reads, writes, shares_all
        self._held: dict[int, Any] = {}  # by number; kept to the end, since the other end may refer to them
        self._numbers: dict[int, int] = {}  # by id
        self._remotes: dict[int, Any] = {}
        self.is_gone = self.is_unportable = False

    def hold_first(self, value: Any) -> None:
        """Makes `value` the object that the other end knows as number 0."""
        assert self._hold(value) == 0

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        data = len(data).to_bytes(_HEAD_BYTES, "little") + data
        try:
            while data:
                data = data[write(self._writes, data) :]
        except OSError:
            self.is_gone = True
            raise Gone from None

    def receive(self) -> Any:
        """The next message. Raises Gone if it is malformed or too long: then the other end is not our program."""
        size = int.from_bytes(self._exactly(_HEAD_BYTES), "little")
        try:
            if size <= _MAX_BYTES:
                return json.loads(self._exactly(size))
        except (ValueError, RecursionError):
            pass
        self.is_gone = True
        raise Gone

    def _exactly(self, size: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < size:
            piece = read(self._reads, min(size - len(pieces), _CHUNK_BYTES))
            if not piece:
                self.is_gone = True
                raise Gone
            pieces += piece
        return bytes(pieces)

    # --- calls -------------------------------------------------------------------------------------------------------

    def ask(self, what: str, *arguments: Any, **named: Any) -> Any:
        """Requests an operation and returns its result. Raises the other end's error as its closest builtin class."""
        self.send(["ask", what, [self.encode(a) for a in arguments], {k: self.encode(v) for k, v in named.items()}])
        while True:
            kind, *rest = self.receive()
            if kind == "ask":
                self._answer(*rest)
            elif kind == "raise":
                raise self._error(*rest)
            else:
                value, changed = rest
                self._change(arguments, changed)
                return self.decode(value)

    def serve(self) -> None:
        """Answers requests until the other end closes."""
        while True:
            _, *rest = self.receive()
            self._answer(*rest)

    def _answer(self, what: str, arguments: list[Any], named: dict[str, Any]) -> None:
        try:
            values = [self.decode(a) for a in arguments]
            result = self._do(what, values, {k: self.decode(v) for k, v in named.items()})
            changed = [self.encode(v) if type(v) in _MUTABLE else None for v in values]
            answer = ["return", self.encode(result), changed]
        except Gone:
            raise
        except BaseException as error:
            answer = ["raise", self._hold_error(type(error)), self._data(error.args)]
        self.send(answer)

    def _do(self, what: str, values: list[Any], named: dict[str, Any]) -> Any:
        if what == "call":
            return values[0](*values[1:], **named)
        if not self._shares_all:
            raise (AttributeError if what == "getattr" else TypeError)("objects of the tests can only be called")
        return _OPERATIONS[what](*values)

    def _change(self, arguments: tuple[Any, ...], changed: list[Any]) -> None:
        """Copies the other end's changes of lists, dicts and sets back to the arguments."""
        for ours, theirs in zip(arguments, changed, strict=True):
            new = self.decode(theirs)
            if type(ours) is not type(new) or type(ours) not in _MUTABLE or ours == new:
                continue
            ours.clear()
            ours.extend(new) if isinstance(ours, list) else ours.update(new)

    # --- values ------------------------------------------------------------------------------------------------------

    def encode(self, value: Any) -> Any:
        """Encodes a value for JSON: scalars, text and lists as themselves, other values as objects with one key."""
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value) if -_SMALL_INT < value < _SMALL_INT else {"i": hex(value)}
        if isinstance(value, str):
            return str.__getitem__(value, slice(None))
        if isinstance(value, list):
            return [self.encode(item) for item in list.__iter__(value)]
        if isinstance(value, dict):
            return {"d": [[self.encode(k), self.encode(v)] for k, v in dict.items(value)]}
        for key, base in _SEQUENCES.items():
            if isinstance(value, base):  # type: ignore[arg-type]
                return {key: [self.encode(item) for item in base(value)]}
        return self._encode_other(kind, value)

    def _encode_other(self, kind: type, value: Any) -> Any:
        if kind is complex:
            return {"c": [value.real, value.imag]}
        if kind in (bytes, bytearray):
            return {"b" if kind is bytes else "y": value.decode("latin-1")}
        if kind is range:
            return {"r": [self.encode(n) for n in (value.start, value.stop, value.step)]}
        if kind is slice:
            return {"l": [self.encode(n) for n in (value.start, value.stop, value.step)]}
        if kind is Remote:
            return {"yours": _number(value)}
        if isinstance(value, type) and value in self._remotes.values():
            return {"yours": next(number for number, remote in self._remotes.items() if remote is value)}
        if (name := _NAMES.get(id(value))) is not None:
            return {"u": name}
        if (parts := _PARTS.get((kind.__module__, kind.__qualname__))) is not None:
            return {"x": [kind.__module__, kind.__qualname__, self.encode(parts(value))]}
        if not self._shares_all and not callable(value):
            self.is_unportable = True
            raise Unportable(f"the tests pass the code a {kind.__name__}, which cannot be sent to another process")
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"error": self._hold_error(value)}
        return {"mine": self._hold(value)}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((key, held),) = value.items()
        if key == "mine":
            return self._remotes.setdefault(held, Remote(self, held))
        if key == "error":
            return self._error_class(*held)
        if key == "yours":
            return self._held[held]
        if key in _SEQUENCES:
            return _SEQUENCES[key](map(self.decode, held))
        return self._decode_other(key, held)

    def _decode_other(self, key: str, held: Any) -> Any:
        if key == "d":
            return {self.decode(k): self.decode(v) for k, v in held}
        if key == "i":
            return int(held, 16)
        if key == "c":
            return complex(*held)
        if key in ("b", "y"):
            return (bytes if key == "b" else bytearray)(held.encode("latin-1"))
        if key in ("r", "l"):
            return (range if key == "r" else slice)(*map(self.decode, held))
        if key == "u":
            return _BUILTINS[held]
        module, name, parts = held
        if (module, name) not in _PARTS:
            raise TypeError(f"{module}.{name}")
        return getattr(__import__(module), name)(*self.decode(parts))

    def _data(self, values: Any) -> list[Any]:
        try:
            return [self.encode(value) for value in values]
        except BaseException:
            return []

    def _hold(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._held))
        self._held.setdefault(number, value)
        return number

    def _hold_error(self, kind: type[BaseException]) -> list[Any]:
        """Describes an error class by its number (-1 for a builtin), its name and its builtin base classes."""
        bases = [base.__name__ for base in kind.__mro__ if _ERRORS.get(base.__name__) is base]
        return [-1 if _ERRORS.get(kind.__name__) is kind else self._hold(kind), kind.__name__, bases]

    def _error_class(self, number: int, name: str, bases: list[str]) -> type[BaseException]:
        base = next((_ERRORS[base] for base in bases if base in _ERRORS), Exception)
        if number < 0:
            return base
        made: type[BaseException] = self._remotes.setdefault(number, type(str(name), (base,), {}))
        return made

    def _error(self, kind: list[Any], arguments: list[Any]) -> BaseException:
        made = self._error_class(*kind)
        try:
            return made(*map(self.decode, arguments))
        except Exception:  # the class takes other arguments
            return RuntimeError(made.__name__)


class Remote:
    """A proxy of an object in the other process, which forwards operations there and equals no local value.

    Local data in a comparison or a calculation is not forwarded: the object could adapt its result to what the tests
    expect.
    """

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _ask(self, "call", *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Remote and bool(_ask(self, "eq", other)))

    def __hash__(self) -> int:
        return _number(self)

    def __iter__(self) -> Iterator[Any]:
        steps = _ask(self, "iter")
        while True:
            try:
                value = _ask(steps, "next")
            except StopIteration:
                return
            yield value

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delitem", key)

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Remote and bool(_ask(self, "isinstance", instance))


def _number(remote: Remote) -> int:
    number: int = object.__getattribute__(remote, "_number")
    return number


def _ask(remote: Remote, what: str, *arguments: Any, **named: Any) -> Any:
    peer: Peer = object.__getattribute__(remote, "_peer")
    return peer.ask(what, remote, *arguments, **named)


def _forward(name: str, what: str) -> None:
    def forward(self: Remote, *others: Any) -> Any:
        return _ask(self, what, *others) if all(type(other) is Remote for other in others) else NotImplemented

    setattr(Remote, name, forward)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **_UNARY,
    **{name: getattr(operator, name) for name in (*_BINARY, "neg", "eq", "getitem", "setitem", "delitem")},
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "isinstance": lambda kind, instance: isinstance(instance, kind),
}
for _name in (*_BINARY, *_UNARY, "neg"):
    _forward(f"__{_name.strip('_')}__", _name)
