"""Prompts in batches: an order that is a function of the seed, and where it stands."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Tokenized(Protocol):
    """A prompt, or an example."""

    @property
    def tokens(self) -> Sequence[int]:
        """What tells it from others."""


Item = TypeVar("Item", bound=Tokenized)


class PromptBatches(Generic[Item]):
    """Training batches of prompts, or of examples, without end; which, is a function of
    the arguments alone.

    Every epoch has each prompt once, in an order drawn from (seed, epoch), or in the
    data's own order. A batch may span two epochs, but never has a prompt twice: those
    of the first come after it in the second.
    """

    def __init__(
        self,
        prompts: Sequence[Item],
        batch_size: int,
        seed: int,
        shuffle: bool,
        noun: str = "prompts",
    ) -> None:
        if not 0 < batch_size <= len(prompts):
            raise ValueError(
                f"data.train_batch_size is {batch_size} but there are "
                f"{len(prompts)} training {noun}; use at most {len(prompts)}"
            )
        self._prompts = list(prompts)
        self._identity = {
            "num_prompts": len(prompts),
            "tokens_sha256": _fingerprint(prompts),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
        }
        self._restart()

    def __iter__(self) -> "PromptBatches[Item]":
        return self

    def __next__(self) -> list[Item]:
        return [self._prompts[i] for i in self._advance()]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._epoch + self._index / len(self._prompts)

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        return {**self._identity, "batches": self._batches}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken: the same batches follow.

        Raises:
          ValueError: it was taken of other prompts, or of another order.
        """
        for key, mine in self._identity.items():
            if state[key] != mine:
                raise ValueError(
                    f"the saved position is of other training data: {key} was "
                    f"{state[key]!r} and is now {mine!r}"
                )
        self._restart()
        for _ in range(state["batches"]):
            self._advance()

    def put(self, prompts: Sequence[Item]) -> None:
        """Deals out the same prompts, of which more is known by now.

        Raises:
          ValueError: they are others.
        """
        if _fingerprint(prompts) != self._identity["tokens_sha256"]:
            raise ValueError("other prompts are put in the place of those dealt out")
        self._prompts = list(prompts)

    def _restart(self) -> None:
        self._batches = self._epoch = self._index = 0
        self._order = self._draw(0)

    def _draw(self, epoch: int) -> Int[np.ndarray, " N"]:
        order = np.arange(len(self._prompts))
        if self._identity["shuffle"]:
            np.random.default_rng([self._identity["seed"], epoch]).shuffle(order)
        return order

    def _advance(self) -> Int[np.ndarray, " batch"]:
        """Indices of the next batch."""
        size = self._identity["batch_size"]
        batch = self._order[self._index : self._index + size]
        self._index += len(batch)
        missing = size - len(batch)
        if missing:
            self._epoch += 1
            order = self._draw(self._epoch)
            first = np.flatnonzero(~np.isin(order, batch))[:missing]
            self._order = np.concatenate([order[first], np.delete(order, first)])
            batch = np.concatenate([batch, self._order[:missing]])
            self._index = missing
        self._batches += 1
        return batch


def _fingerprint(prompts: Sequence[Tokenized]) -> str:
    """SHA-256 of the tokens of all prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.array([len(prompt.tokens), *prompt.tokens], "<i8").tobytes())
    return digest.hexdigest()
