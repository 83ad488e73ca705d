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


class Watch:
    """Looks at every step of a run."""

    def __init__(self, config: Config):
        self._config = config
        self._rewarded = checks.learns_from_rewards(config)
        self._patience = min(PATIENCE, config.trainer.total_training_steps)
        self._in_a_row: dict[str, int] = {}
        self._cause = ""
        self._updates = {
            "actor": settings.updates_per_step(config),
            "critic": settings.critic_updates_per_step(config),
        }

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
                *self._of_updates(advantages, learned),
                *_of_mismatch(self._config, learned),
            )
        }

    def stop(self, step: int) -> None:
        """Raises CannotLearn if no update was possible for
        `trainer.max_skipped_steps` steps."""
        most = self._config.trainer.max_skipped_steps
        for name in self._updates:
            if most and self._in_a_row.get(f"{name} skipped", 0) >= most:
                raise CannotLearn(
                    f"step {step}: no gradient of the {_ROLES[name]} was finite for "
                    f"{most} steps in a row (trainer.max_skipped_steps), so that "
                    f"nothing is learned: {self._cause}"
                )

    def _lasts(self, kind: str, is_so: bool) -> bool:
        self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1 if is_so else 0
        return self._in_a_row[kind] >= self._patience

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

    def _of_updates(
        self, advantages: np.ndarray, learned: Mapping[str, float]
    ) -> Advice:
        trainer = self._config.trainer
        for name, updates in self._updates.items():
            skipped = learned.get(f"{name}/update_skipped", 0.0)
            self._lasts(f"{name} skipped", skipped >= updates)
            if not skipped:
                continue
            self._cause = _cause(advantages, learned, name)
            ends = f"after {trainer.max_skipped_steps} steps without any the run stops"
            yield (
                f"{name}_skipped",
                f"{skipped:.0f} of {updates} updates of the {_ROLES[name]} were "
                f"skipped, because the gradient is not finite: {self._cause}"
                + (f"; {ends}" if trainer.max_skipped_steps else ""),
            )


_ROLES = {"actor": "policy", "critic": "critic"}


def _cause(advantages: np.ndarray, learned: Mapping[str, float], name: str) -> str:
    """Why a gradient is not finite, as far as the metrics tell."""
    finite = np.isfinite(advantages)
    if not finite.all():
        return (
            f"{(~finite).sum()} of {finite.size} advantages are not finite; rewards so "
            "large, or so far apart, do not fit into float32: scale them down"
        )
    loss = learned.get(f"{name}/pg_loss", learned.get(f"{name}/vf_loss", np.nan))
    if np.isfinite(loss):
        return (
            f"the loss is finite ({loss:.3g}) and its gradient overflows; lower "
            f"{name}.optim.lr, or compute in {name}.dtype=float32"
        )
    return (
        "the loss is not finite, though advantages up to "
        f"{np.abs(advantages).max():.3g} are; the model's outputs overflow: "
        f"go on from an earlier checkpoint with a lower {name}.optim.lr, or compute in "
        f"{name}.dtype=float32"
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
