"""One environment where it lives: in a worker's process, in a thread, or at once.

What comes in and goes out is plain data, so that it can be another process. Little is
imported here, for every worker imports it.
"""

import asyncio
import inspect
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm.workers.messages import dump_function, load_function, show_error

Made = Callable[..., Any]

_LONGEST_ANSWER = 2**16
"""Characters of one answer of a tool."""


class Portable:
    """A function, which arrives in another process as itself."""

    def __init__(self, value: Made):
        """Raises NotPortable if it cannot be sent."""
        self._payload = dump_function(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_function, (self._payload,)


class Seat:
    """Plays one episode after another with one instance of an environment.

    Args:
      make: a class or a function that makes an instance; None for tools alone.
      tools: functions by name, besides an instance's methods.
      params: arguments of `make`.
      alone: whether nothing else draws random numbers in this process, so that the
        process' own may be seeded.
    """

    def __init__(
        self,
        make: Made | Portable | None,
        tools: Mapping[str, Made | Portable],
        params: Mapping[str, Any],
        *,
        alone: bool = False,
    ):
        self._make, self._tools, self._params = make, tools, params
        self._alone = alone
        self._loop: asyncio.AbstractEventLoop | None = None
        self.instance: Any = None

    def __call__(self, what: str, **arguments: Any) -> Any:
        """Answers one of `begin`, `run`, `step` and `reward`."""
        return getattr(self, what)(**arguments)

    def begin(self, columns: Mapping[str, Any], seed: int) -> Any:
        """The environment's first words in a new episode: text, messages, or None.

        Args:
          columns: of the row; those that `reset` takes. One called "seed" takes the
            place of `seed`.
        """
        if self._alone:
            _seed_everything(seed)
        if self.instance is None:
            self.instance = self._make(**self._params)
            if self._alone:  # making it may have drawn, and imported numpy
                _seed_everything(seed)
        given = {"seed": seed, **columns}
        words = self._finished(self.instance.reset(**taken(self.instance.reset, given)))
        return words[0] if isinstance(words, tuple) else words  # Gymnasium adds info

    def run(
        self, calls: Sequence[tuple[str, Mapping[str, Any]]], seed: int | None = None
    ) -> list[Any]:
        """The answer of each function that is called, and whether it raised: one after
        the other, coroutines side by side.

        Args:
          seed: of the random numbers that they draw; None to go on with those of the
            episode.
        """
        if self._alone and seed is not None:
            _seed_everything(seed)
        found = [self._called(name, arguments) for name, arguments in calls]
        waiting = [index for index, (x, _) in enumerate(found) if _awaited(x)]
        if waiting:
            results = self._finished(_gathered([found[index][0] for index in waiting]))
            for index, result in zip(waiting, results, strict=True):
                found[index] = _answer(result)
        return found

    def step(self, text: str) -> dict[str, Any]:
        """What an environment that reads text makes of a turn: `words`, `reward`,
        `terminated` and `truncated`."""
        result = self._finished(self.instance.step(text))
        if isinstance(result, Mapping) and "observations" in result:
            words, reward = result["observations"], result.get("reward")
            terminated, truncated = result.get("done"), False
        elif isinstance(result, tuple | list) and len(result) == 5:
            words, reward, terminated, truncated, _ = result
        elif isinstance(result, tuple | list) and len(result) == 4:
            words, reward, terminated, _ = result
            truncated = False
        else:
            raise TypeError(
                f"step returned {result!r:.200}, not (observation, reward, terminated, "
                "truncated, info)"
            )
        return {
            "words": words,
            "reward": reward,
            "terminated": bool(terminated),
            "truncated": bool(truncated),
        }

    def reward(self, text: str) -> Any:
        """What the environment says that the episode was worth.

        Args:
          text: the policy's last turn, for a `get_reward` that takes `completion`.
        """
        given = {"completion": text}
        get = self.instance.get_reward
        return self._finished(get(**taken(get, given)))

    def _called(self, name: str, arguments: Mapping[str, Any]) -> tuple[Any, bool]:
        """What a function returned, and whether it raised."""
        try:
            function = self._tools.get(name) or getattr(self.instance, name)
            result = function(**arguments)
        except Exception as error:  # noqa: BLE001 - the policy reads whatever it is
            result = error
        return (result, False) if _awaited(result) else _answer(result)

    def _finished(self, result: Any) -> Any:
        """`result`, or what it comes to."""
        if not _awaited(result):
            return result
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loop": None, "instance": None}

    def __del__(self) -> None:
        if getattr(self, "_loop", None):
            self._loop.close()


def _awaited(result: Any) -> bool:
    return inspect.isawaitable(result)


async def _gathered(awaitables: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _answer(result: Any) -> tuple[str, bool]:
    """What the policy reads of a result or an error, and whether it is an error."""
    failed = isinstance(result, Exception)
    if failed:
        result = {"error": show_error(result)}
    if not isinstance(result, str):
        try:
            result = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            result = str(result)
    if len(result) > _LONGEST_ANSWER:
        left = len(result) - _LONGEST_ANSWER
        result = f"{result[:_LONGEST_ANSWER]}... ({left} more characters)"
    return result, failed


def taken(function: Made, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C
        return {}
    names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {k: v for k, v in given.items() if rest or k in names}


def _seed_everything(seed: int) -> None:
    """The random numbers that libraries draw who know no generator of their own."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
