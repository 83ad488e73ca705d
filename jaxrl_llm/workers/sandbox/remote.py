"""Tests in one process, what they test in another: only plain data goes between.

A test calls what it takes for the program's function, and is given what that returned:
numbers, text, and lists, tuples, sets and dictionaries of them. Anything else stays
where it is and is spoken to from afar, as are classes and their objects. So nothing
that a program returns can say of itself that it equals what a test asks for, and
nothing of the tests can be read by the program, but the arguments that it is called
with.

This module also runs inside jails: standard library only.
"""

import builtins
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range)
_CONTAINERS = (dict, list, tuple, set, frozenset)
_MADE_BY_NAME = ("complex", "range")
"""What of these a pickle names. Their types cannot be changed by setting attributes."""


class NotPlain(TypeError):
    """A test gives a program something that cannot be sent to it."""


class Unanswered(ConnectionError):
    """The program's process has ended."""


def _plain(value: Any) -> Any:
    """Plain data as built-in types, `_Kept` around everything else."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in dict.items(value)}
    for base in _CONTAINERS[1:]:
        if isinstance(value, base):
            return base(map(_plain, base.__iter__(value)))
    for base in (str, bool, int, float, bytes):
        if isinstance(value, base):
            return base.__new__(base, value)
    return _Kept(value)


class _Kept:
    """Something that stays where it is."""

    def __init__(self, value: Any):
        self.value = value


class _Pickler(pickle.Pickler):
    def __init__(self, sink: io.BytesIO, number: Callable[[Any], int]):
        super().__init__(sink, pickle.HIGHEST_PROTOCOL)
        self._number = number

    def persistent_id(self, value: Any) -> int | None:
        """The number of what is not sent."""
        return self._number(value.value) if type(value) is _Kept else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, of: Callable[[int], Any]):
        super().__init__(io.BytesIO(data))
        self._of = of

    def find_class(self, module: str, name: str) -> Any:
        """Refuses every name but those of plain types that are made by name."""
        if module == "builtins" and name in _MADE_BY_NAME:
            return getattr(builtins, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")

    def persistent_load(self, number: Any) -> Any:
        """What stands for a number here."""
        return self._of(number)


def _dump(value: Any, number: Callable[[Any], int]) -> bytes:
    sink = io.BytesIO()
    _Pickler(sink, number).dump(_plain(value))
    return sink.getvalue()


def _load(data: bytes, of: Callable[[int], Any]) -> Any:
    return _Unpickler(data, of).load()


class Program:
    """The names that a program defines, and what it keeps.

    Args:
      names: by what it is asked for.
      failed: what it raised before it had them all.
    """

    def __init__(self, names: Mapping[str, Any], failed: BaseException | None = None):
        self._names, self._failed = names, failed
        self._kept: list[Any] = []

    def answer(self, question: bytes) -> bytes:
        """The answer to a question of `Tests`."""
        try:
            kind, of, arguments, named = _load(question, self._kept.__getitem__)
            match kind:
                case "name":
                    if self._failed:
                        raise self._failed
                    if of not in self._names:
                        raise NameError(f"name {of!r} is not defined")
                    result = self._names[of]
                case "get":
                    result = getattr(of, *arguments)
                case "set":
                    result = setattr(of, *arguments)
                case "iter":
                    result = iter(of)
                case "items":
                    result = list(itertools.islice(of, *arguments))
                    result = result, len(result) == arguments[0]
                case _:
                    result = of(*arguments, **named)
            return _dump(("returned", result, arguments), self._number)
        except BaseException as error:  # noqa: BLE001 - programs raise anything
            return _dump(("raised", *_described(error)), self._number)

    def _number(self, value: Any) -> int:
        self._kept.append(value)
        return len(self._kept) - 1


def _described(error: BaseException) -> tuple[str, str]:
    """The built-in type that an error is of, and its text."""
    name = next(
        kind.__name__
        for kind in type(error).__mro__
        if getattr(builtins, kind.__name__, None) is kind
    )
    try:
        return name, str(error)[:1000]
    except Exception:  # noqa: BLE001 - this is the program's too
        return name, ""


class Tests:
    """What tests see of a program.

    Args:
      ask: sends a question to the `Program` and waits for its answer.
    """

    def __init__(self, ask: Callable[[bytes], bytes]):
        self._ask, self.count = ask, 0
        """`count`: questions so far."""

    def name(self, name: str) -> Any:
        """What the program calls by this name.

        Raises:
          NameError: nothing.
        """
        return self.asked("name", name)

    def asked(
        self, kind: str, of: Any, arguments: tuple = (), named: Any = None
    ) -> Any:
        """What came of a question; lists, dictionaries and sets among the arguments are
        then what the program has made of them.

        Raises:
          Exception: what the program raised, as the built-in type that it is of.
          NotPlain: an argument cannot be sent.
          Unanswered: the program has ended.
        """
        question = _dump((kind, of, arguments, named or {}), _number_there)
        self.count += 1
        how, *found = _load(self._ask(question), lambda number: Remote(self, number))
        if how == "raised":
            kind = getattr(builtins, str(found[0]), None)
            fits = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if fits else RuntimeError)(found[1])
        result, seen = found
        for ours, theirs in zip(arguments, seen, strict=True):
            if type(ours) is type(theirs) is list:
                ours[:] = theirs
            elif type(ours) is type(theirs) and type(ours) in (dict, set):
                ours.clear()
                ours.update(theirs)
        return result


def _number_there(value: Any) -> int:
    if type(value) is Remote:
        return _of_remote(value)[1]
    raise NotPlain(f"a test gives the program a {type(value).__name__}")


class Remote:
    """Something of the program's. It equals nothing but itself."""

    __slots__ = ("_there",)

    def __init__(self, tests: Tests, number: int):
        object.__setattr__(self, "_there", (tests, number))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _asked(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _asked(self, "set", name, value)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What calling it there returns."""
        return _of_remote(self)[0].asked("call", self, arguments, named)

    def __iter__(self) -> Iterator[Any]:
        iterator, more = _asked(self, "iter"), True
        while more:
            items, more = _asked(iterator, "items", _AT_ONCE)
            yield from items

    def __next__(self) -> Any:
        items, _ = _asked(self, "items", 1)
        if not items:
            raise StopIteration
        return items[0]

    def __len__(self) -> int:
        try:
            return _asked(self, "get", "__len__")()
        except AttributeError as error:  # list() tries, and takes no other error
            raise TypeError(str(error)) from None

    def __getitem__(self, key: Any) -> Any:
        return _asked(self, "get", "__getitem__")(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _asked(self, "get", "__setitem__")(key, value)

    def __contains__(self, value: Any) -> bool:
        return bool(_asked(self, "get", "__contains__")(value))

    def __str__(self) -> str:
        return str(_asked(self, "get", "__str__")())


_AT_ONCE = 100
"""Items of an iterator that are fetched together."""


def _of_remote(remote: Remote) -> tuple[Tests, int]:
    return object.__getattribute__(remote, "_there")


def _asked(remote: Remote, kind: str, *arguments: Any) -> Any:
    return _of_remote(remote)[0].asked(kind, remote, arguments)
