"""Environments of both kinds, each in a worker of its own, with limits of time.

An environment with `step` reads the policy's words and answers with text (Gymnasium,
textarena, GEM, skyrl-gym). One without has methods that the policy calls as tools
(TRL's `environment_factory`), as it calls functions (`tools`). A worker plays one
episode at a time, so that one that hangs or ends takes no other with it, and so that
the random numbers of its process are the episode's own.
"""

import functools
import inspect
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from jaxrl_llm.agents import adapters, tools
from jaxrl_llm.agents.environments import Environments, Key, Opening, Outcome, Reply
from jaxrl_llm.agents.seat import Made, Portable, Seat
from jaxrl_llm.config import plugins
from jaxrl_llm.config.names import ConfigError, near
from jaxrl_llm.data.types import Message, Prompt, Status
from jaxrl_llm.workers.messages import NotPortable, dump_function
from jaxrl_llm.workers.pool import Inline, Thread, Worker
from jaxrl_llm.workers.process import (
    GIB,
    Failed,
    Limits,
    Process,
    WorkerError,
    close_idle,
)
from jaxrl_llm.workers.process import Outcome as Called
from jaxrl_llm.workers.switchboard import Switchboard, TimedOut

_GAMES = "jaxrl_llm.agents.games"
BUILT_IN: Mapping[str, str] = {
    "calculator": f"{_GAMES}.calculator:Calculator",
    "higher_lower": f"{_GAMES}.higher_lower:HigherLower",
    "wordle3": f"{_GAMES}.wordle3:Wordle3",
    "blackjack": f"{_GAMES}.blackjack:Blackjack",
    "python": "jaxrl_llm.workers.sandbox.tool:python",
}
"""Environments and tools of the package by the names that a configuration has for
them."""

_MOST_UNREADABLE = 3
"""Turns in a row whose calls cannot be read, before an episode ends."""


_NEXT_SEED = 0x9E3779B1
"""Between the seeds of one turn's functions and the next one's."""


class BrokenEnvironment(RuntimeError):
    """An environment raised, or ended its process, in one episode."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the policy plays with, and the limits of that."""

    tools: Sequence[Made] = ()
    """Functions with types and Google docstrings, which may be `async`."""
    apart: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Names of those that run in workers of their own and not in an environment's, and
    how many of these each has: no more calls of it are under way at a time."""
    environment: Made | Mapping[str, Made] | None = None
    """A class, or a function that makes an instance; or several by name, of which the
    column `environment` of a row names one."""
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Arguments of the class."""
    max_tool_calls: int | None = None
    """Calls in one episode; the policy is told so of those beyond. Any number if
    None."""
    turn_timeout_s: float = 30.0
    """Seconds for what an environment does at a time."""
    workers: int = 256
    """Most processes, or threads: as many episodes are under way at a time."""
    isolation: Literal["auto", "process", "thread"] = "auto"
    """process: each worker is a process, which is killed when it hangs. thread: of this
    process. auto: a process, but for what cannot be sent there, and for the package's
    own games, which are played at once."""
    memory_gib: float | None = 8.0
    """Address space of each process; None for all there is."""


def find(key: str, name: str) -> Made:
    """The environment or the tool that a configuration names.

    Args:
      key: of the configuration; errors begin with it.
      name: one of `BUILT_IN`, textarena:ID, gem:ID, or module:name.

    Raises:
      ConfigError: there is none.
    """
    if name in BUILT_IN:
        return plugins.find(key, BUILT_IN[name])
    if ":" not in name:
        raise ConfigError(
            f"{key}: there is no {name!r}{near(name, BUILT_IN)}; give module:name, "
            f"textarena:ID, gem:ID, or one of {', '.join(BUILT_IN)}"
        )
    library, _, env_id = name.partition(":")
    other = {"textarena": adapters.TextArena, "gem": adapters.Gem}.get(library)
    if other and not env_id.isidentifier():
        return functools.partial(other, env_id)
    return plugins.find(key, name)


@dataclass(frozen=True)
class _Kind:
    """An environment, and what the policy can do with it."""

    name: str
    make: Made | None
    """None for functions alone."""
    steps: bool
    """Whether it reads text."""
    rewards: bool
    """Whether it says what an episode is worth."""
    schemas: tuple[tools.Schema, ...]
    own: bool
    """Whether it is the package's, and known to be quick."""


class Hosted(Environments):
    """Environments in workers.

    Args:
      format: how the policy writes calls.

    Raises:
      ValueError: a setting that makes no environment, or a function that has no schema;
        the message says what to do.
    """

    def __init__(self, settings: Settings, format: tools.Format):
        self._settings, self._format = settings, format
        if not settings.tools and settings.environment is None:
            raise ValueError("agent: give tools, an environment, or both")
        if not settings.turn_timeout_s > 0 or settings.workers < 1:
            raise ValueError(
                f"agent: turn_timeout_s is {settings.turn_timeout_s:g} and workers "
                f"{settings.workers}; both are more than 0"
            )
        given = settings.environment
        self._several = isinstance(given, Mapping)
        named = given if self._several else {"": given}
        self._kinds = {
            name: _kind(name, make, settings) for name, make in named.items()
        }
        self._board = Switchboard()
        tools_of: dict[str, list[Made]] = {name: [] for name in ("", *settings.apart)}
        for function in settings.tools:
            name = function.__name__
            tools_of[name if name in settings.apart else ""].append(function)
        self._rooms = _Rooms(replace(settings, tools=tools_of.pop("")), self._kinds)
        self._apart: dict[str, _Rooms] = {}
        for name, functions in tools_of.items():
            alone = replace(
                settings,
                tools=functions,
                environment=None,
                workers=settings.apart[name],
            )
            self._apart[name] = _Rooms(alone, {"": _kind("", None, alone)})
        self._episodes: dict[Key, _Episode] = {}

    @property
    def gives_rewards(self) -> bool:
        """Whether every environment says what an episode is worth."""
        return all(kind.rewards for kind in self._kinds.values())

    @property
    def roles(self) -> list[str]:
        """The roles that the policy is answered in."""
        kinds = self._kinds.values()
        calls, steps = any(k.schemas for k in kinds), any(k.steps for k in kinds)
        return ["tool"] * calls + ["user"] * steps

    @property
    def notes(self) -> list[str]:
        """A line for each environment that lives in a thread though it was to have a
        process: why, and what that means."""
        every = (self._rooms, *self._apart.values())
        return [note for rooms in every for note in rooms.notes]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a row whose column `environment` names none."""
        for prompt in prompts:
            self._kind_of(prompt)

    def open(self, key: Key, prompt: Prompt, seed: int) -> Future[Opening]:
        """Begins an episode, as soon as a worker is free."""
        if key in self._episodes:
            raise ValueError(f"episode {key} is open already")
        episode = self._episodes[key] = _Episode(self._kind_of(prompt), seed)
        messages = _messages(prompt)
        if episode.kind.make is None:
            return _ready(Opening(messages=messages, tools=episode.kind.schemas))
        opening: Future[Opening] = Future()
        columns = dict(prompt.columns)
        if self._several:
            del columns["environment"]
        arguments = {
            "what": "begin",
            "columns": {"prompt": list(messages), **columns},
            "seed": seed,
        }

        def begun(outcome: Called, seconds: float) -> Opening:
            try:
                if isinstance(outcome, Failed):
                    raise BrokenEnvironment(f"reset {outcome.cause}\n{outcome.trace}")
                said = _opened(messages, outcome.value, episode.kind)
            except BrokenEnvironment:
                self._episodes.pop(key)
                self._give_back(episode, broken=True)
                raise
            return Opening(messages=said, tools=episode.kind.schemas)

        def seated(worker: Worker) -> None:
            episode.worker = worker
            self._call(episode.kind, worker, arguments, opening, begun)

        self._rooms.take(episode.kind.name, seated, opening)
        return opening

    def answer(self, key: Key, text: str) -> Future[Reply]:
        """Carries out what the policy calls, or has an environment read its words."""
        episode = self._episodes[key]
        episode.text, episode.turns = text, episode.turns + 1
        schemas = episode.kind.schemas
        # Without any, what looks like a call is a word to the environment.
        found = tools.calls(self._format, text, schemas) if schemas else ()
        if found:
            return self._run(episode, found)
        if not episode.kind.steps:
            return _ready(Reply(ended="completed"))
        reply: Future[Reply] = Future()
        arguments = {"what": "step", "text": text}
        self._call(episode.kind, episode.worker, arguments, reply, episode.stepped)
        return reply

    def close(self, key: Key) -> Future[Outcome]:
        """Asks what an episode was worth, and frees its worker."""
        episode = self._episodes.pop(key)
        kind = episode.kind
        if episode.broken or kind.make is None or kind.steps or not kind.rewards:
            reward = episode.reward if kind.steps else None
            return _ready(self._left(episode, reward))
        outcome: Future[Outcome] = Future()

        def told(called: Called, seconds: float) -> Outcome:
            if isinstance(called, Failed):
                episode.broken = True
                why = f"get_reward {called.cause}\n{called.trace}".strip()
                return self._left(episode, None, why)
            try:
                reward = called.value
                if reward is not None:
                    reward = _number(reward, "get_reward")
            except BrokenEnvironment as error:
                return self._left(episode, None, str(error))
            return self._left(episode, reward)

        arguments = {"what": "reward", "text": episode.text}
        self._call(kind, episode.worker, arguments, outcome, told)
        return outcome

    def shutdown(self) -> None:
        """Ends all workers; futures that are not ready are cancelled."""
        self._board.close()
        for rooms in (self._rooms, *self._apart.values()):
            rooms.close()

    def _kind_of(self, prompt: Prompt) -> _Kind:
        name = prompt.columns.get("environment") if self._several else ""
        if name not in self._kinds:
            raise ValueError(
                f"prompt {prompt.id}: its column environment is {name!r}, there are "
                f"{', '.join(self._kinds)}"
            )
        return self._kinds[name]

    def _call(
        self,
        kind: _Kind,
        worker: Worker,
        arguments: Mapping[str, Any],
        future: Future[Any],
        made: Callable[[Called, float], Any],
    ) -> None:
        """Calls a worker; what `made` makes of what came of it, and of the
        seconds that took, goes to `future`."""
        began, limit_s = time.monotonic(), self._settings.turn_timeout_s

        def over(called: Future[Called]) -> None:
            try:
                outcome = called.result()
                future.set_result(made(outcome, time.monotonic() - began))
            except CancelledError:
                future.cancel()
            except WorkerError as error:
                future.set_exception(
                    ValueError(
                        f"{_title(kind)} does not start in a process of its "
                        f"own: {error}; see agent.isolation"
                    )
                )
            except Exception as error:  # noqa: BLE001 - whoever waits must know
                future.set_exception(error)

        self._board.call(worker, arguments, limit_s).add_done_callback(over)

    def _run(
        self, episode: "_Episode", found: Sequence[tools.Call | tools.Mistake]
    ) -> Future[Reply]:
        """Carries out calls, as many as are allowed, and answers each."""
        plan: list[tools.Call | tools.Mistake] = []
        for call in found:
            most = self._settings.max_tool_calls
            if isinstance(call, tools.Call):
                episode.calls += 1
                if most is not None and episode.calls > most:
                    why = f"no more than {most} calls are allowed; answer without any"
                    call = tools.Mistake("too_many_calls", why)
            plan.append(call)
        calls = [call for call in plan if isinstance(call, tools.Call)]
        unread = all(_kind_of_mistake(call) == "unreadable" for call in plan)
        episode.unread = episode.unread + 1 if unread else 0
        if not calls:
            return _ready(episode.answered(plan, [], 0.0))
        places: dict[str, list[int]] = {}
        for place, call in enumerate(calls):
            apart = call.name if call.name in self._apart else ""
            places.setdefault(apart, []).append(place)
        parts = {
            apart: self._carried_out(episode, [calls[i] for i in where], apart)
            for apart, where in places.items()
        }

        def answered(outcomes: Mapping[str, tuple[Called, float]]) -> Reply:
            results: list[Any] = [None] * len(calls)
            seconds = max(spent for _, spent in outcomes.values())
            for apart, (called, _) in outcomes.items():
                if isinstance(called, Failed):
                    return episode.ended(called, seconds)
                for place, result in zip(places[apart], called.value, strict=True):
                    results[place] = result
            return episode.answered(plan, results, seconds)

        return _together(parts, answered)

    def _carried_out(
        self, episode: "_Episode", calls: Sequence[tools.Call], apart: str
    ) -> Future[tuple[Called, float]]:
        """What came of calls, and the seconds that they took.

        Args:
          apart: the function whose workers run them; "" for the episode's own.
        """
        done: Future[tuple[Called, float]] = Future()
        arguments: dict[str, Any] = {
            "what": "run",
            "calls": [(c.name, dict(c.arguments)) for c in calls],
        }
        kind = episode.kind
        if not apart and kind.make is not None:
            self._call(kind, episode.worker, arguments, done, lambda *came: came)
            return done
        # Functions alone have no instance to keep.
        arguments["seed"] = (episode.seed + _NEXT_SEED * episode.turns) % 2**32
        rooms, name = (self._apart[apart], "") if apart else (self._rooms, kind.name)

        def seated(worker: Worker) -> None:
            def ran(called: Called, seconds: float) -> tuple[Called, float]:
                rooms.give_back(name, worker, broken=isinstance(called, Failed))
                return called, seconds

            self._call(kind, worker, arguments, done, ran)

        rooms.take(name, seated, done)
        return done

    def _left(
        self, episode: "_Episode", reward: float | None, why: str = ""
    ) -> Outcome:
        """What an episode came to; its worker is free."""
        instance = None
        if episode.worker is not None:
            instance = self._rooms.instance(episode.worker)
            self._give_back(episode, broken=episode.broken)
        return Outcome(reward=reward, environment=instance, why=why)

    def _give_back(self, episode: "_Episode", *, broken: bool) -> None:
        worker, episode.worker = episode.worker, None
        if worker is not None:
            self._rooms.give_back(episode.kind.name, worker, broken=broken)


@dataclass(eq=False)
class _Episode:
    """One that is open."""

    kind: _Kind
    seed: int
    worker: Worker | None = None
    text: str = ""
    """The policy's last turn."""
    reward: float = 0.0
    """The sum of its turns'."""
    turns: int = 0
    calls: int = 0
    unread: int = 0
    """Turns in a row whose calls could not be read."""
    broken: bool = False

    def ended(self, failed: Failed, seconds: float) -> Reply:
        """The end of an episode whose environment failed."""
        self.broken = True
        status: Status = "tool_timeout" if isinstance(failed, TimedOut) else "env_error"
        why = f"the environment {failed.cause}\n{failed.trace}".strip()
        return Reply(ended=status, why=why, failures={status: 1}, seconds=seconds)

    def stepped(self, called: Called, seconds: float) -> Reply:
        """What an environment made of a text."""
        if isinstance(called, Failed):
            return self.ended(called, seconds)
        result = called.value
        try:
            messages = _said(result["words"])
            reward = result["reward"]
            reward = 0.0 if reward is None else _number(reward, "step")
        except BrokenEnvironment as error:
            return self.ended(Failed(str(error)), seconds)
        self.reward += reward
        ended: Status | None = None
        if result["terminated"] or result["truncated"]:
            ended = "completed" if result["terminated"] else "max_turns"
        return Reply(messages=messages, reward=reward, ended=ended, seconds=seconds)

    def answered(
        self,
        plan: Sequence[tools.Call | tools.Mistake],
        results: Sequence[Sequence[Any]],
        seconds: float,
    ) -> Reply:
        """What the policy reads of its calls, in their order.

        Args:
          results: of those that were made, the text and whether it is an error.
        """
        messages, failures, left = [], {}, iter(results)
        for call in plan:
            if isinstance(call, tools.Call):
                name, (text, raised) = call.name, next(left)
                kind = "raised" if raised else None
            else:
                name, kind = "error", call.kind
                text = json.dumps({"error": call.why}, ensure_ascii=False)
            if kind:
                failures[kind] = failures.get(kind, 0) + 1
            messages.append({"role": "tool", "name": name, "content": _clean(text)})
        over = self.unread == _MOST_UNREADABLE
        return Reply(
            messages=tuple(messages),
            ended="parse_error" if over else None,
            why=plan[-1].why if over else "",
            calls=len(results),
            failures=failures,
            seconds=seconds,
        )


class _Rooms:
    """Workers: made when they are needed, and used again."""

    def __init__(self, settings: Settings, kinds: Mapping[str, _Kind]):
        self._settings, self._kinds = settings, kinds
        self._functions = {function.__name__: function for function in settings.tools}
        self._idle: dict[str, list[Worker]] = {name: [] for name in kinds}
        self._all: dict[Worker, Seat | None] = {}
        self._waiting: deque[tuple[str, Callable[[Worker], None], Future[Any]]] = (
            deque()
        )
        self._lock = threading.Lock()
        self.notes: list[str] = []
        self._payloads = {name: self._payload(kind) for name, kind in kinds.items()}

    def take(
        self, name: str, seated: Callable[[Worker], None], future: Future[Any]
    ) -> None:
        """Gives `seated` a worker, now or when one is free; errors go to `future`."""
        with self._lock:
            self._waiting.append((name, seated, future))
        self._serve()

    def give_back(self, name: str, worker: Worker, *, broken: bool) -> None:
        """A worker is free; a broken one is ended."""
        with self._lock:
            if broken or self._all.get(worker) is not None:
                self._end(worker)
            else:
                self._idle[name].append(worker)
        self._serve()

    def instance(self, worker: Worker) -> Any:
        """The environment that lives in a worker of this process."""
        seat = self._all.get(worker)
        return None if seat is None else seat.instance

    def close(self) -> None:
        """Ends all workers."""
        with self._lock:
            for worker in list(self._all):
                self._end(worker)
        close_idle()

    def _serve(self) -> None:
        """Gives workers to those that wait, the first first."""
        while True:
            with self._lock:
                worker = self._free()
                if worker is None:
                    return
                _, seated, future = self._waiting.popleft()
            try:
                seated(worker)
            except WorkerError as error:
                future.set_exception(error)

    def _free(self) -> Worker | None:
        """A worker for the first that waits."""
        if not self._waiting:
            return None
        name = self._waiting[0][0]
        if self._idle[name]:
            return self._idle[name].pop()
        if len(self._all) == self._settings.workers:
            others = [idle for idle in self._idle.values() if idle]
            if not others:
                return None
            self._end(others[0].pop())
        return self._made(self._kinds[name])

    def _made(self, kind: _Kind) -> Worker:
        payload, seat = self._payloads[kind.name], None
        if payload is None:
            # One for each episode: its instance is looked at after the episode's end.
            seat = Seat(kind.make, self._functions, self._settings.params)
            worker = Inline(seat) if kind.own else Thread(seat, _title(kind))
        else:
            memory = self._settings.memory_gib
            worker = Process(
                payload,
                _title(kind),
                Limits(memory_bytes=None if memory is None else int(memory * GIB)),
                preload=("jaxrl_llm.agents.seat", *_preloaded(kind)),
            )
        self._all[worker] = seat
        return worker

    def _end(self, worker: Worker) -> None:
        del self._all[worker]
        if isinstance(worker, Process):
            worker.release()
        else:
            worker.close()

    def _payload(self, kind: _Kind) -> bytes | None:
        """What a process is sent; None if there will be none."""
        how = self._settings.isolation
        if how == "thread" or (how == "auto" and kind.own):
            return None
        try:
            functions = {name: Portable(f) for name, f in self._functions.items()}
            make = kind.make and Portable(kind.make)
            return dump_function(
                Seat(make, functions, self._settings.params, alone=True)
            )
        except NotPortable as error:
            if how == "process":
                raise ValueError(
                    f"{_title(kind)} cannot live in a process of its own: {error}; set "
                    "agent.isolation to auto or thread"
                ) from None
            self.notes.append(
                f"{_title(kind)} lives in threads of this process, not in processes of "
                f"its own: {error}. There, a call that hangs is left behind and goes on"
            )
            return None


def _kind(name: str, make: Made | None, settings: Settings) -> _Kind:
    schemas = [tools.schema(function) for function in settings.tools]
    steps = rewards = False
    if make is not None:
        made = _class_of(make, settings)
        has = {member for member in dir(made) if callable(getattr(made, member, None))}
        if {"init", "step"} <= has and "reset" not in has:
            make, has = functools.partial(adapters.SkyRL, make), has | {"reset"}
        steps, where = "step" in has, f"agent.environment: {made.__name__}"
        rewards = steps or "get_reward" in has
        if "reset" not in has:
            raise ValueError(f"{where} has no method reset")
        if not steps:
            schemas += [tools.schema(method) for method in _methods(made)]
        if not steps and not schemas:
            raise ValueError(
                f"{where} has neither a method step, which reads text, nor methods "
                "that the policy can call"
            )
        _check_params(make, settings.params, where)
    names = [tools.name_of(schema) for schema in schemas]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"agent.tools: two are called {sorted(twice)[0]!r}")
    own = [*settings.tools, *([make] if make else [])]
    return _Kind(
        name=name,
        make=make,
        steps=steps,
        rewards=rewards,
        schemas=tuple(schemas),
        own=all(getattr(f, "__module__", "").startswith(_GAMES) for f in own),
    )


def _class_of(make: Made, settings: Settings) -> type:
    """The class of what `make` makes."""
    inner = make.func if isinstance(make, functools.partial) else make
    return inner if inspect.isclass(inner) else type(make(**settings.params))


def _methods(made: type) -> list[Made]:
    """Those that the policy can call, as TRL has it: all that are public."""
    found = []
    for name, method in inspect.getmembers(made, inspect.isfunction):
        if name.startswith("_") or name in ("reset", "get_reward"):
            continue
        static = isinstance(inspect.getattr_static(made, name), staticmethod)
        # Bound to nothing: a schema has no parameter `self`.
        found.append(method if static else method.__get__(object()))
    return found


def _check_params(make: Made, params: Mapping[str, Any], where: str) -> None:
    try:
        inspect.signature(make).bind(**params)
    except TypeError as error:
        raise ValueError(f"{where}: agent.params {dict(params)}: {error}") from None
    except ValueError:  # of C: it has no signature to read
        return


def _preloaded(kind: _Kind) -> list[str]:
    """Libraries that are imported once, for all processes."""
    inner = kind.make.func if isinstance(kind.make, functools.partial) else None
    return {adapters.TextArena: ["textarena"], adapters.Gem: ["gem"]}.get(inner, [])


def _title(kind: _Kind) -> str:
    return f"environment {kind.name!r}" if kind.name else "the environment"


def _kind_of_mistake(call: tools.Call | tools.Mistake) -> str | None:
    return call.kind if isinstance(call, tools.Mistake) else None


def _together(
    parts: Mapping[str, Future[Any]], made: Callable[[Mapping[str, Any]], Any]
) -> Future[Any]:
    """What `made` makes of all results, when there are all."""
    whole: Future[Any] = Future()
    left, lock = [len(parts)], threading.Lock()

    def over(_: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        try:
            whole.set_result(
                made({name: part.result() for name, part in parts.items()})
            )
        except CancelledError:
            whole.cancel()
        except Exception as error:  # noqa: BLE001 - whoever waits must know
            whole.set_exception(error)

    for part in parts.values():
        part.add_done_callback(over)
    return whole


# Words of environments.


def _messages(prompt: Prompt) -> tuple[Message, ...]:
    content = prompt.content
    if isinstance(content, str):
        return ({"role": "user", "content": content},)
    return tuple(content)


def _opened(
    messages: tuple[Message, ...], words: Any, kind: _Kind
) -> tuple[Message, ...]:
    """A conversation with an environment's first words: behind the last message's, or
    messages in place of all but a system message."""
    if words is None:
        return messages
    if isinstance(words, str):
        last = messages[-1]
        between = "\n\n" if kind.steps and last["content"] else ""
        content = f"{last['content']}{between}{_clean(words)}"
        return (*messages[:-1], {**last, "content": content})
    said = _said(words) or messages
    system = messages[:1] if messages[0]["role"] == "system" else ()
    return said if said[0]["role"] == "system" else (*system, *said)


def _said(words: Any) -> tuple[Message, ...]:
    """An environment's words as messages.

    Raises:
      BrokenEnvironment: they are neither text nor messages.
    """
    if words is None or isinstance(words, str):
        return ({"role": "user", "content": _clean(words or "")},)
    listed = words if isinstance(words, list) else [words]
    if not all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in listed
    ):
        raise BrokenEnvironment(
            f"said {words!r:.200}, which is neither text nor chat messages"
        )
    return tuple({"role": "user", **m, "content": _clean(m["content"])} for m in listed)


def _clean(text: str) -> str:
    """Text that a tokenizer can read, without halves of surrogate pairs."""
    return text.encode(errors="backslashreplace").decode()


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool | int | float) and abs(value) < float("inf"):
        return float(value)
    raise BrokenEnvironment(f"{where} returned {value!r:.200}, not a finite number")


def _ready(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
