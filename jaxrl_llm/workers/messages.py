"""What goes between a worker's process and the one that it works for.

A function goes to the worker by cloudpickle: closures, lambdas and functions of a
script or a notebook by value, those of modules that the worker can import by name. What
comes back is plain data only, so that a worker which runs somebody's code cannot make
the other side run any.
"""

import importlib.machinery
import inspect
import io
import numbers
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cloudpickle

_LONGEST_TEXT = 2000
"""Characters shown of what somebody's code says about itself."""


class NotPortable(ValueError):
    """A function that cannot be sent to another process; the message says why."""


class Opaque:
    """Stands for something that is no plain data."""

    def __init__(self, kind: str, text: str):
        self.kind, self.text = kind, text

    def __repr__(self) -> str:
        return self.text


class Unjudged(float):
    """A score of 0 for a reply that there was no time to judge."""


def dump_function(function: Callable[..., Any]) -> bytes:
    """A function and what it closes over, for `load_function` in another process.

    Raises:
      NotPortable: it cannot be pickled, or holds what lives on a device.
    """
    module = sys.modules.get(getattr(_inner(function), "__module__", None) or "")
    by_value = not (
        module is None
        or module.__name__ == "__main__"  # always by value
        or module.__name__ in cloudpickle.list_registry_pickle_by_value()
        or _on_path(module)
    )
    sink = io.BytesIO()
    try:
        if by_value:
            cloudpickle.register_pickle_by_value(module)
        try:
            _FunctionPickler(sink).dump(function)
        finally:
            if by_value:
                cloudpickle.unregister_pickle_by_value(module)
    except NotPortable:
        raise
    except Exception as error:  # noqa: BLE001 - objects refuse with errors of any type
        raise NotPortable(f"it cannot be pickled ({show_error(error)})") from error
    return sink.getvalue()


def load_function(payload: bytes) -> Callable[..., Any]:
    """What `dump_function` was given."""
    return pickle.loads(payload)


def _inner(function: Any) -> Any:
    """What a module has by name, below partial objects, methods and decorators."""
    while hasattr(function, "func"):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    return function if hasattr(function, "__qualname__") else type(function)


def _on_path(module: Any) -> bool:
    """Whether an import finds this very module, as another process would do it."""
    spec, found, path = getattr(module, "__spec__", None), None, None
    if spec is None:
        return False
    parts = spec.name.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None:
            return spec.origin in ("built-in", "frozen")
        path = found.submodule_search_locations
    return found is not None and found.origin == spec.origin


class _FunctionPickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Refuses arrays on a device, which would be copied to a host without it."""
        kind = type(obj)
        library = kind.__module__.partition(".")[0]
        if (
            (library in ("jax", "jaxlib") and hasattr(kind, "addressable_shards"))
            or (library == "torch" and getattr(obj, "is_cuda", False))
            or (library == "cupy" and hasattr(kind, "__cuda_array_interface__"))
        ):
            raise NotPortable(f"it holds a {library}.{kind.__name__} on a device")
        return super().reducer_override(obj)


def plain(value: Any) -> Any:
    """`value` as None, bool, int, float, str, bytes, and lists and dicts of them.

    Arrays become nested lists, other sequences lists, other numbers floats; anything
    else is `Opaque`.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes, Unjudged):
        return value
    if kind in (list, tuple):
        return [plain(item) for item in value]
    try:
        for base in (str, bool, int, float):
            if isinstance(value, base):
                return base(value)
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        if isinstance(value, numbers.Real):
            return float(value)
        if isinstance(value, Mapping):
            return {plain(k): plain(v) for k, v in value.items()}
        if isinstance(value, Sequence):
            return [plain(item) for item in value]
    except Exception as error:  # noqa: BLE001 - somebody's `__float__`, `__iter__`, ...
        return Opaque(kind.__name__, f"<{kind.__name__}: {show_error(error)}>")
    return Opaque(kind.__name__, _show(value))


def dump_plain(value: Any) -> bytes:
    """Plain data as bytes."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def load_plain(data: bytes) -> Any:
    """Plain data of `dump_plain`, whoever made the bytes.

    Raises:
      pickle.UnpicklingError: they are something else.
    """
    return _PlainUnpickler(io.BytesIO(data)).load()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuses every name but those of this module's own two."""
        if module == __name__ and name in ("Opaque", "Unjudged"):
            return globals()[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def show_error(error: BaseException) -> str:
    """The type and the text of an error, also of one whose text raises."""
    return f"{type(error).__name__}: {_show(error, str)}"


def _show(value: Any, of: Callable[[Any], str] = repr) -> str:
    try:
        text = str(of(value))
    except BaseException as error:  # noqa: BLE001 - this is somebody's code too
        return f"<its text cannot be made: {type(error).__name__}>"
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."
