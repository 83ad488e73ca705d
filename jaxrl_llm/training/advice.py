"""What to look at and what to change, where what a run has seen says that something
should be: above all, that it cannot learn.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

from jaxrl_llm.config import checks, plugins
from jaxrl_llm.config.schema import Config
from jaxrl_llm.training import settings
from jaxrl_llm.training.experience import Groups

PATIENCE = 3
"""What may be chance in one step is told after so many in a row, or after all steps of
a shorter run."""
LEAST_ENTROPY = 0.01
"""Nats per token; below it, sampling again gives the same response."""

Advice = Iterator[tuple[str, str]]
"""A kind, which is told once in a run, and the text."""


class CannotLearn(ValueError):
    """A run that would go on without learning anything; the message says why."""


class UpdateWatch:
    """Looks at the updates of a run: whether they can be made at all.

    Args:
      updates: of a step, by the name that their metrics begin with.
      roles: what learns, by that name.
      keys: the section of the settings of each, by that name.
      patience: what may be chance is told after so many steps in a row.
      max_skipped_steps: the run stops after so many without any; 0: it goes on.
    """

    def __init__(
        self,
        updates: Mapping[str, int],
        *,
        roles: Mapping[str, str],
        keys: Mapping[str, str],
        patience: int,
        max_skipped_steps: int,
    ):
        self._updates, self._roles, self._keys = updates, roles, keys
        self._patience, self._most = patience, max_skipped_steps
        self._in_a_row: dict[str, int] = {}
        self._cause = ""

    def stop(self, step: int) -> None:
        """Raises CannotLearn if no update was possible for
        `trainer.max_skipped_steps` steps."""
        for name in self._updates:
            if self._most and self._in_a_row.get(f"{name} skipped", 0) >= self._most:
                raise CannotLearn(
                    f"step {step}: no gradient of the {self._roles[name]} was finite "
                    f"for {self._most} steps in a row (trainer.max_skipped_steps), so "
                    f"that nothing is learned: {self._cause}"
                )

    def of_updates(
        self, learned: Mapping[str, float], advantages: np.ndarray | None = None
    ) -> Advice:
        """What there is to say of the updates of a step.

        Args:
          learned: their metrics.
          advantages: that the policy learned from, if it did from such.
        """
        for name, updates in self._updates.items():
            skipped = learned.get(f"{name}/update_skipped", 0.0)
            self._lasts(f"{name} skipped", skipped >= updates)
            if not skipped:
                continue
            self._cause = _cause(advantages, learned, name, self._keys[name])
            ends = f"after {self._most} steps without any the run stops"
            yield (
                f"{name}_skipped",
                f"{skipped:.0f} of {updates} updates of the {self._roles[name]} were "
                f"skipped, because the gradient is not finite: {self._cause}"
                + (f"; {ends}" if self._most else ""),
            )

    def _lasts(self, kind: str, is_so: bool) -> bool:
        self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1 if is_so else 0
        return self._in_a_row[kind] >= self._patience


class Watch(UpdateWatch):
    """Looks at every step of a run."""

    def __init__(self, config: Config):
        self._config, trainer = config, config.trainer
        self._rewarded = checks.learns_from_rewards(config)
        super().__init__(
            {
                "actor": settings.updates_per_step(config),
                "critic": settings.critic_updates_per_step(config),
            },
            roles={"actor": "policy", "critic": "critic"},
            keys={"actor": "actor", "critic": "critic"},
            patience=min(PATIENCE, trainer.total_training_steps),
            max_skipped_steps=trainer.max_skipped_steps,
        )

    def advise(
        self,
        step: int,
        groups: Groups,
        advantages: Float[np.ndarray, "P G"],
        learned: Mapping[str, float],
    ) -> dict[str, str]:
        """What there is to say after a step, by kind.

        Args:
          advantages: of the responses that are trained on.
          learned: metrics of the updates.
        """
        return {
            kind: f"step {step}: {text}"
            for kind, text in (
                *(self._of_rewards(groups) if self._rewarded else ()),
                *self._of_responses(groups, learned),
                *self.of_updates(learned, advantages),
                *_of_mismatch(self._config, learned),
            )
        }

    def _of_rewards(self, groups: Groups) -> Advice:
        scores, config = groups.generated.scores, self._config
        look = f"look at the completions in {config.output_dir}/rollouts"
        silent = {
            name: self._lasts(f"silent {name}", bool(np.isnan(x).all()))
            for name, x in scores.by_function.items()
        }
        failed = {
            name: self._lasts(f"failed {name}", count >= scores.total.size)
            for name, count in scores.errors.items()
        }
        if all(silent.values()):
            yield (
                "rewards_none",
                "no reward function judges any response (all return None), so every "
                f"reward is 0 and nothing is learned; {look}, and at the columns and "
                "the form of answer that the functions look for",
            )
        for name in (name for name, is_so in silent.items() if is_so):
            if all(silent.values()):
                break
            yield (
                f"silent/{name}",
                f"the reward function {name} judges no response (it returns None for "
                "all); check the columns and the form of answer that it looks for",
            )
        for name in (name for name, is_so in failed.items() if is_so):
            yield (
                f"failed/{name}",
                f"the reward function {name} fails on every response, which scores 0 "
                "(reward.on_error is zero); set reward.on_error=raise to see why",
            )
        total = scores.total
        same = self._lasts("same", bool((total == total.flat[0]).all()))
        in_groups = bool((total == total[:, :1]).all())
        in_groups = self._lasts("same in groups", in_groups)
        if all(silent.values()):
            return
        if same:
            yield (
                "rewards_equal",
                f"every response gets the same reward, {total.flat[0]:.6g} "
                f"(critic/rewards), so nothing tells good from bad; {look}: are the "
                "questions too hard or too easy, is the form of answer that the reward "
                "looks for asked for, does rollout.max_response_length leave room for "
                "it?",
            )
        elif in_groups and plugins.estimator_of(config.algorithm).group:
            yield (
                "groups_equal",
                "all responses to a question get the same reward "
                "(training/groups_all_equal is 1), of which "
                f"{config.algorithm.adv_estimator} learns nothing; {look}, and raise "
                "rollout.n or rollout.temperature, or give other questions",
            )

    def _of_responses(self, groups: Groups, learned: Mapping[str, float]) -> Advice:
        config, rollouts = self._config, groups.generated.rollouts
        flat = [episode for group in rollouts for episode in group]
        cut = all(episode.finish_reason == "length" for episode in flat)
        if self._lasts("cut off", cut):
            yield (
                "cut_off",
                "every response is cut off at rollout.max_response_length "
                f"{config.rollout.max_response_length} (response_length/clip_ratio is "
                "1); raise it, or see that the model ends its answers: by its chat "
                "template, its stop tokens or rollout.stop",
            )
        agent = config.agent
        first = agent is not None and all(
            len(one.turns) == 1 and not one.played.calls for one in flat
        )
        if self._lasts("first turns", first):
            yield (
                "no_tool_called",
                "every episode ends with its first turn and no tool is called "
                "(agent/tool_calls is 0); if one should be, look at the completions in "
                f"{config.output_dir}/rollouts: does the policy write calls as "
                f"agent.parser {agent.parser} reads them? Another parser, or a few "
                "examples to learn from first (jaxrl sft), helps",
            )
        remedy = (
            "raise rollout.temperature or actor.entropy_coeff, lower actor.optim.lr, "
            "or go on from an earlier checkpoint"
        )
        compares = config.rollout.n > 1 and self._rewarded
        alike = compares and all(
            np.array_equal(one.tokens, group[0].tokens)
            for group in rollouts
            for one in group
        )
        if self._lasts("alike", alike):
            yield (
                "responses_alike",
                "all responses to a question are the same, so that there is nothing "
                f"to compare; {remedy}, or let more through than rollout.top_k "
                f"{config.rollout.top_k} and rollout.top_p {config.rollout.top_p} do",
            )
        entropy = learned.get("actor/entropy", np.inf)
        if self._lasts("entropy", entropy < LEAST_ENTROPY):
            yield (
                "entropy",
                f"the policy is sure of every token: its entropy is {entropy:.2g} nats "
                f"(actor/entropy), so it tries nothing new; {remedy}",
            )


def _cause(
    advantages: np.ndarray | None, learned: Mapping[str, float], name: str, key: str
) -> str:
    """Why a gradient is not finite, as far as the metrics tell."""
    finite = np.isfinite(advantages) if advantages is not None else np.ones(1, bool)
    if not finite.all():
        return (
            f"{(~finite).sum()} of {finite.size} advantages are not finite; rewards so "
            "large, or so far apart, do not fit into float32: scale them down"
        )
    kinds = ("pg_loss", "vf_loss", "loss")
    known = (learned[f"{name}/{k}"] for k in kinds if f"{name}/{k}" in learned)
    loss = next(known, np.nan)
    if np.isfinite(loss):
        return (
            f"the loss is finite ({loss:.3g}) and its gradient overflows; lower "
            f"{key}.optim.lr, or compute in {key}.dtype=float32"
        )
    though = ""
    if advantages is not None:
        though = f", though advantages up to {np.abs(advantages).max():.3g} are"
    return (
        f"the loss is not finite{though}; the model's outputs overflow: "
        f"go on from an earlier checkpoint with a lower {key}.optim.lr, or compute in "
        f"{key}.dtype=float32"
    )


def _of_mismatch(config: Config, metrics: Mapping[str, float]) -> Advice:
    """What to change when sampler and trainer differ by more than they should."""
    found, most = metrics.get("mismatch/logprob_diff_mean", 0.0), config.rollout
    if config.algorithm.rollout_correction or not found > most.max_mismatch:
        return
    yield (
        "mismatch",
        f"sampler and trainer differ by {found:.3g} nats per token "
        "(mismatch/logprob_diff_mean), over rollout.max_mismatch "
        f"{most.max_mismatch}: --algorithm.rollout_correction.rollout_is "
        "token corrects for it",
    )
