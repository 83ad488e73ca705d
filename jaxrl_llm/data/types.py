"""What flows through a step on the host: prompts, the episodes that begin with them,
and what those are worth."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt

from jaxrl_llm.config.names import Status

Message = Mapping[str, Any]


@no_type_check  # JAX also builds such trees of shapes or shardings
class RouterUse(NamedTuple):
    """How a model spreads the tokens of rows over its E experts: sums over tokens that
    are no padding, and over layers."""

    chosen: Float[Array, "R E"]
    """How often each expert is chosen; not differentiated."""
    probabilities: Float[Array, "R E"]
    """What the router gives it, a softmax over all experts."""
    count: Float[Array, " R"]
    """Tokens times layers."""
    agreeing: Float[Array, " R"]
    """Those of them whose experts are the router's own choice; others are replayed."""
    routes: UInt[Array, "R T L k"] | None = None
    """The experts of every token in each of L layers that have any, see `TrainBatch`;
    None if nobody asked."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question, tokenized. Lives on the host."""

    id: int
    """Index in the data set before shuffling; part of the key of its random numbers."""
    content: str | list[Message]
    """What is asked: plain text, or the chat messages that a template is put around."""
    tokens: tuple[int, ...]
    """After the chat template and, where allowed, truncation."""
    columns: Mapping[str, Any]
    """Every other column of the row ("answer", ...), for the reward functions."""
    text: str | None = None
    """The question, if the data set has it as text that became a chat message: reward
    functions get this text, and text for each response to it."""
    media: tuple[Any, ...] = ()
    """Images, sound or video that `tokens` stand for. No model here reads any."""

    @property
    def for_rewards(self) -> str | list[Message]:
        """The question in the data set's form: text, or chat messages."""
        return self.content if self.text is None else self.text

    def __post_init__(self) -> None:
        if self.media:
            raise ValueError(
                f"prompt {self.id} has {len(self.media)} entries in its field media, "
                "which no model here reads; leave it empty"
            )


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an engine returns for one sample of a request. Lives on the host.

    The three arrays have one entry per sampled token, the stop token included.
    """

    prompt_id: int
    sample: int
    """0 .. G-1: which of the responses to this prompt."""
    tokens: np.ndarray
    """int32 [t]."""
    logprobs: np.ndarray
    """float32 [t], nats: under the distribution that was sampled from (after
    temperature, top-k, top-p and min-p)."""
    raw_logprobs: np.ndarray | None
    """float32 [t], nats: under the model's own distribution (temperature 1, nothing
    cut off); None where an engine does not tell."""
    finish_reason: str
    """"stop": a stop token or string ended it. "length": it reached its limit."""
    weight_version: int
    """The training step that made the weights it was sampled with."""
    text: str
    """Decoded, without special tokens and without the stop string."""
    full_logprobs: np.ndarray | None = None
    """float32 [t], nats: after temperature, before top-k, top-p and min-p cut anything
    off; NaN where an engine does not tell. None if nothing was to be cut off: they are
    `logprobs`."""
    top_tokens: np.ndarray | None = None
    """int32 [t, N]: the most likely ones at every position, the first first; None where
    none were asked for."""
    top_logprobs: np.ndarray | None = None
    """float32 [t, N], nats: theirs, under the distribution that was sampled from; at
    temperature 0, where that is a single token, under softmax(logits)."""
    prompt_logprobs: np.ndarray | None = None
    """float32 [p - 1], nats: of the prompt's tokens but the first, under the model's
    own distribution; None where they were not asked for."""
    prefilled: int | None = None
    """Tokens that were computed before the first could be sampled: those of the prompt
    that no page of the cache held. None where an engine does not tell."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the policy or its environment adds to an episode at once. Lives on the host.

    The four arrays have one entry per token.
    """

    role: str
    """Who speaks, in the words of chat templates: "assistant", "user", "tool", ..."""
    tokens: np.ndarray
    """int32 [t]."""
    response_mask: np.ndarray
    """bool [t]: whether the policy sampled it. The others are observations."""
    logprobs: np.ndarray
    """float32 [t], nats: after temperature, before top-k, top-p and min-p cut anything
    off, as a trainer computes them; NaN where an engine does not tell. Not read where
    the mask is False."""
    weight_versions: np.ndarray
    """int32 [t]: the training step that made the weights it was sampled with; not read
    where the mask is False."""
    finish_reason: str | None
    """`Completion.finish_reason`; None if the policy has no part in the turn."""
    text: str
    """Decoded, without special tokens and without a stop string."""
    kept_mass: np.ndarray | None = None
    """float32 [t], 0 to 1: the probability of all tokens that top-k, top-p and min-p
    left to draw from; NaN where an engine does not tell. Not read where the mask is
    False; None if nothing was to be cut off."""
    reward: float | None = None
    """What its environment gave the policy for this turn alone; None for nothing."""
    new_context: bool = False
    """Its tokens are the whole conversation so far, as the chat template writes it now:
    tokens from here on do not see those before."""

    @classmethod
    def sampled(cls, completion: Completion) -> "Turn":
        """A turn that the policy sampled from its first token to its last."""
        count = len(completion.tokens)
        logprobs, kept_mass = completion.full_logprobs, None
        if logprobs is None:
            logprobs = completion.logprobs
        else:
            kept_mass = np.exp(np.minimum(logprobs - completion.logprobs, 0.0))
        return cls(
            role="assistant",
            tokens=completion.tokens,
            response_mask=np.ones(count, bool),
            logprobs=logprobs,
            kept_mass=kept_mass,
            weight_versions=np.full(count, completion.weight_version, np.int32),
            finish_reason=completion.finish_reason,
            text=completion.text,
        )

    @classmethod
    def observed(
        cls,
        role: str,
        tokens: Sequence[int] | np.ndarray,
        text: str,
        *,
        new_context: bool = False,
    ) -> "Turn":
        """A turn that the policy did not write, such as a tool's answer. Without tokens
        it did not read it either: the episode was over."""
        count = len(tokens)
        return cls(
            role=role,
            tokens=np.asarray(tokens, np.int32),
            response_mask=np.zeros(count, bool),
            logprobs=np.zeros(count, np.float32),
            weight_versions=np.full(count, -1, np.int32),
            finish_reason=None,
            text=text,
            new_context=new_context,
        )


@dataclass(frozen=True, kw_only=True)
class Played:
    """What an environment did in an episode."""

    reward: float | None = None
    """What it gave for the whole episode, the rewards of turns included; None for
    nothing."""
    calls: int = 0
    """Tools that were called."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """How often something went wrong, by kind."""
    seconds: float = 0.0
    """How long it took for its answers."""
    why: str = ""
    """What happened, where the episode ended by a failure."""
    attempt: int = 0
    """How often the episode was begun anew because it failed."""
    prefilled: int | None = None
    """Tokens that the engine computed besides those that it sampled; None where it does
    not tell."""
    environment: Any = None
    """The environment itself, for reward functions that look at it; None where it lives
    in another process."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A prompt's id and the turns that followed it. Lives on the host.

    A single response is an episode of one turn. t = tokens of all turns.
    """

    prompt_id: int
    sample: int
    """0 .. G-1: which of the episodes that begin with this prompt."""
    turns: tuple[Turn, ...]
    status: Status = "completed"
    opening: tuple[Message, ...] = ()
    """The conversation before the first turn, of an episode with an environment."""
    opening_tokens: tuple[int, ...] | None = None
    """Tokens of `opening`; None if they are the prompt's."""
    played: Played | None = None
    """None without an environment."""
    masked: bool = False
    """Nothing is learned from it, and its reward says nothing of the policy."""

    def __post_init__(self) -> None:
        for index, turn in enumerate(self.turns):
            for name in ("response_mask", "logprobs", "weight_versions", "kept_mass"):
                values = getattr(turn, name)
                if values is not None and len(values) != len(turn.tokens):
                    raise ValueError(
                        f"episode {self.sample} of prompt {self.prompt_id}: turn "
                        f"{index} has {len(turn.tokens)} tokens but {len(values)} "
                        f"{name}"
                    )
        if not self.turns:
            raise ValueError(
                f"episode {self.sample} of prompt {self.prompt_id} has no turns"
            )

    @classmethod
    def of(cls, completion: Completion) -> "Episode":
        """The episode whose one turn is `completion`."""
        return cls(
            prompt_id=completion.prompt_id,
            sample=completion.sample,
            turns=(Turn.sampled(completion),),
            status="max_tokens"
            if completion.finish_reason == "length"
            else "completed",
        )

    def first_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens before its first turn.

        Args:
          prompt: that it begins with.
        """
        return prompt.tokens if self.opening_tokens is None else self.opening_tokens

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """int32 [t]: everything after the prompt."""
        return self._joined("tokens")

    @functools.cached_property
    def response_mask(self) -> np.ndarray:
        """bool [t]: whether the policy sampled the token."""
        return self._joined("response_mask")

    @functools.cached_property
    def contexts(self) -> np.ndarray:
        """int32 [t]: which context the token stands in, counted from 0, the one that
        begins with the prompt."""
        number = np.cumsum([turn.new_context for turn in self.turns], dtype=np.int32)
        return np.repeat(number, [len(turn.tokens) for turn in self.turns])

    @property
    def num_contexts(self) -> int:
        """How many there are; 1 if none begins anew."""
        return 1 + sum(turn.new_context for turn in self.turns)

    def context_lengths(self, prompt: Prompt) -> list[int]:
        """Tokens of every context, of the first one with the prompt.

        Args:
          prompt: that it begins with.
        """
        first, *others = np.bincount(self.contexts, minlength=1).tolist()
        return [len(self.first_tokens(prompt)) + first, *others]

    @functools.cached_property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return int(self.response_mask.sum())

    @property
    def policy_turns(self) -> tuple[Turn, ...]:
        """The turns that the policy has a part in."""
        return tuple(turn for turn in self.turns if turn.finish_reason is not None)

    @functools.cached_property
    def logprobs(self) -> np.ndarray:
        """float32 [t], nats: as of `Turn`."""
        return self._joined("logprobs")

    @functools.cached_property
    def kept_mass(self) -> np.ndarray:
        """float32, one for each token sampled from what top-k, top-p and min-p left:
        as of `Turn`; empty if nothing was to be cut off."""
        kept = [
            t.kept_mass[t.response_mask] for t in self.turns if t.kept_mass is not None
        ]
        return np.concatenate([np.zeros(0, np.float32), *kept])

    @functools.cached_property
    def weight_versions(self) -> np.ndarray:
        """int32 [t]: the training step that made the weights behind the token."""
        return self._joined("weight_versions")

    @property
    def weight_version(self) -> int:
        """The oldest weights that any of its tokens was sampled with; -1 without a
        sampled token."""
        return min(self.weight_versions[self.response_mask].tolist(), default=-1)

    @property
    def finish_reason(self) -> str | None:
        """Why the policy's last turn ended; None if it had none."""
        reasons = [turn.finish_reason for turn in self.turns if turn.finish_reason]
        return reasons[-1] if reasons else None

    @property
    def text(self) -> str:
        """The texts of all turns, one behind the other."""
        return "".join(turn.text for turn in self.turns)

    def _joined(self, name: str) -> np.ndarray:
        parts = [getattr(turn, name) for turn in self.turns]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def single_turn(completions: Sequence[Sequence[Completion]]) -> list[list[Episode]]:
    """An episode of one turn around each completion."""
    return [[Episode.of(completion) for completion in group] for group in completions]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of one step. Lives on the host."""

    total: Float32[np.ndarray, "P G"]
    """Sum over functions of weight * score. A function that does not judge a response
    adds nothing to it; a response that none judges has 0."""
    by_function: dict[str, Float32[np.ndarray, "P G"]]
    """Unweighted; NaN where the function returned None: it does not judge this one."""
    errors: dict[str, int]
    """Per function, how many responses scored 0 because it failed on them."""
    details: dict[str, Float32[np.ndarray, "P G"]] = field(default_factory=dict)
    """Other numbers that functions return beside a score; NaN where there is none. They
    are logged, and part of no reward."""

    @property
    def judged(self) -> Bool[np.ndarray, "P G"]:
        """Whether any function judges the response."""
        return ~np.all(np.isnan(np.stack([*self.by_function.values()])), axis=0)

    def take(self, prompts: Sequence[int]) -> "Scores":
        """The scores of the given prompts only. `errors` still counts all of them."""
        picked = np.asarray(prompts, np.intp)
        return Scores(
            total=self.total[picked],
            by_function={name: x[picked] for name, x in self.by_function.items()},
            errors=self.errors,
            details={name: x[picked] for name, x in self.details.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Generated:
    """All that the engine made for one step, trained on or not. Lives on the host."""

    asked: Sequence[Prompt]
    rollouts: Sequence[Sequence[Episode]]
    """For each prompt, the G episodes that begin with it."""
    scores: Scores
    greedy: Sequence[Sequence[Episode]] = ()
    """One greedy episode for each prompt that is trained on, if the estimator compares
    with it."""
