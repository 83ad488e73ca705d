"""Episodes in which the policy reads as well as writes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxrl_llm.data.types import Episode, Turn


def part(turn: Turn, begin: int, end: int) -> Turn:
    """The tokens begin .. end - 1 of a turn."""
    names = ("tokens", "response_mask", "logprobs", "weight_versions", "kept_mass")
    cut = {n: x[begin:end] for n in names if (x := getattr(turn, n)) is not None}
    return replace(turn, **cut)


def insert(episode: Episode, observed: Mapping[int, Sequence[int]]) -> Episode:
    """A single turn cut into several: before its sampled token i, the policy reads the
    tokens `observed[i]`."""
    (turn,) = episode.turns
    turns, begin = [], 0
    for i, tokens in sorted(observed.items()):
        if i > begin:
            turns.append(part(turn, begin, i))
        turns.append(Turn.observed("tool", tokens, ""))
        begin = i
    if begin < len(turn.tokens):
        turns.append(part(turn, begin, len(turn.tokens)))
    return replace(episode, turns=tuple(turns))


def anew(episode: Episode) -> Episode:
    """The episode, in which everything that is read begins a new context."""
    turns = [replace(t, new_context=not t.response_mask.any()) for t in episode.turns]
    return replace(episode, turns=tuple(turns))
