"""Whether a user's function still is what it was: its source, and that of the user's
own code that it calls.

Followed are functions, classes and constants that code names, in its module, in
modules of the user's that it imports and in what it closes over. Installed packages and
values that change while a program runs are not.
"""

import ast
import dis
import functools
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def digest(function: Any) -> str:
    """The first 16 digits of a sha256 that changes with the code of `function`."""
    texts = sorted(set(_texts(function, set())))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def is_users(thing: Any) -> bool:
    """Whether a function, class or module is no part of Python, an installed package or
    this one."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    if not isinstance(thing, types.ModuleType):
        name = getattr(thing, "__module__", None) or type(thing).__module__
        thing = sys.modules.get(name)
    if thing is None or thing.__name__ in sys.builtin_module_names:
        return False
    if thing.__name__.partition(".")[0] == __name__.partition(".")[0]:
        return False
    file = getattr(thing, "__file__", None)
    return _is_users_file(file) if file else thing.__name__ == "__main__"


def _is_users_file(file: str) -> bool:
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    places = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    return not any(path.is_relative_to(place) for place in places if place)


def _texts(thing: Any, seen: set[int]) -> Iterator[str]:
    """The texts that make up a function or class and what it reaches."""
    if isinstance(thing, functools.partial):
        bound = [*thing.args, *(v for _, v in sorted(thing.keywords.items()))]
        yield from filter(None, map(_plain, bound))
        thing = thing.func
    thing = inspect.unwrap(thing)
    thing = getattr(thing, "__func__", thing)  # of a method
    if not (inspect.isroutine(thing) or inspect.isclass(thing)):
        thing = type(thing)
    if id(thing) in seen or not is_users(thing):
        return
    seen.add(id(thing))
    codes = _codes(thing)
    try:
        yield inspect.getsource(thing)
    except (OSError, TypeError):
        for code in codes:
            yield code.co_code.hex() + repr(code.co_names)
            yield from filter(None, map(_plain, code.co_consts))
    if inspect.isclass(thing):
        for base in thing.__mro__[1:]:
            yield from _texts(base, seen)
    cells = getattr(thing, "__closure__", None) or ()
    for name, cell in zip(codes[0].co_freevars if cells else (), cells, strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not yet bound
            continue
        if inspect.isroutine(value) or inspect.isclass(value):
            yield from _texts(value, seen)
        elif not _stores(codes[0], name):
            yield f"{name} = {_plain(value)}"
    module = sys.modules.get(thing.__module__)
    for code in codes:
        for name in code.co_names:
            if module is not None and name in vars(module):
                yield from _named(module, name, code, seen)
        yield from _imported(code)


def _named(
    module: types.ModuleType, name: str, code: types.CodeType, seen: set[int]
) -> Iterator[str]:
    """What stands behind a global name that code reads."""
    value = vars(module)[name]
    if isinstance(value, types.ModuleType):
        if is_users(value):
            for attribute in code.co_names:
                if attribute in vars(value):
                    yield from _named(value, attribute, code, seen)
    elif inspect.isroutine(value) or inspect.isclass(value):
        yield from _texts(value, seen)
    elif (assigned := _assignments(module).get(name)) is not None:
        yield assigned
    elif not _stores(code, name):
        yield f"{name} = {_plain(value)}"


def _plain(value: Any) -> str | None:
    """A value that cannot change, as text that is the same in every process."""
    if isinstance(value, tuple | frozenset):
        parts = [str(_plain(part)) for part in value]
        return repr(parts if isinstance(value, tuple) else sorted(parts))
    if isinstance(value, int | float | complex | str | bytes | None):
        return repr(value)
    return None


def _codes(thing: Any) -> list[types.CodeType]:
    """The code of a function or of a class' methods, with what is defined in it."""
    if inspect.isclass(thing):
        inner = [getattr(v, "__func__", v) for v in vars(thing).values()]
        inner = [getattr(v, "fget", v) for v in inner]
        found = [v.__code__ for v in inner if inspect.isfunction(v)]
    else:
        found = [thing.__code__] if hasattr(thing, "__code__") else []
    for code in found:
        found += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found


def _stores(code: types.CodeType, name: str) -> bool:
    """Whether running the code may change what a name from outside stands for."""
    return any(
        i.opname in ("STORE_GLOBAL", "STORE_DEREF") and i.argval == name
        for i in dis.get_instructions(code)
    )


def _imported(code: types.CodeType) -> Iterator[str]:
    """The files of the user's modules that code imports when it runs."""
    for instruction in dis.get_instructions(code):
        if instruction.opname != "IMPORT_NAME":
            continue
        try:
            found = importlib.util.find_spec(instruction.argval)
        except (ImportError, ValueError):
            continue
        if found and found.origin and _is_users_file(found.origin):
            path = Path(found.origin)
            if path.suffix == ".py" and path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")


def _assignments(module: types.ModuleType) -> dict[str, str]:
    """The text that gives each name of a module its value, if it has a source."""
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_file():
        return {}
    return _assignments_in(file, Path(file).stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _assignments_in(file: str, _modified: int) -> dict[str, str]:
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, ValueError, SyntaxError):
        return {}
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        found[part.id] = found.get(part.id, "") + ast.unparse(node)
    return found
