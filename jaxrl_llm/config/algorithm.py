"""Every loss, estimator and optimizer that a configuration can name: one record each.

A record says where the function is and what a run must know of it before the function
is imported, so that a configuration is checked without JAX. Choices, checks, metrics
and `--help` follow from the tables; to add a loss, write the function and its record.
A function of a user's own, `module:function`, gets a record from its signature
(`plugins.loss`, `plugins.estimator`).

Functions take everything by name: arrays, which a run computes, and numbers, which its
configuration has. The names are those of `LOSS_ARRAYS` and so on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.config.names import ConfigError, near

LOSS_ARRAYS = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "mask",
    "sequence_ids",
    "num_sequences",
)
"""What a policy loss may take: arrays [R, T], and the number of sequences. `mask` has
the response tokens that are trained on."""

LOOKING_AHEAD = (
    *LOSS_ARRAYS,
    "tokens",
    "positions",
    "is_prompt",
    "prompt_ids",
    "step",
)
"""What a choice over the whole mini-batch may take besides; `prompt_ids` is None if no
prompt is shared."""

LOSS_NUMBERS = (
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_c",
    "tau_pos",
    "tau_neg",
    "clip_cov_ratio",
    "clip_cov_lb",
    "clip_cov_ub",
    "kl_cov_ratio",
    "ppo_kl_coef",
    "dro_beta",
)
"""Settings of `actor` and `actor.policy_loss` that a loss may take by their names."""

ESTIMATOR_ARRAYS = (
    "rewards",
    "lengths",
    "baselines",
    "rewards_by_function",
    "reward_weights",
    "judged",
    "token_rewards",
    "mask",
    "sequence_ids",
    "positions",
    "is_prompt",
    "logprobs",
    "values",
    "sum_pi_squared",
    "group_ids",
    "sequence_baselines",
    "num_sequences",
    "turn_rewards",
    "num_turns",
)
"""What an estimator may take. Of P prompts with G responses each: `rewards` and
`lengths` [P, G] (0 for one that nothing is learned from, whose reward is then the mean
of the others), `baselines` [P] (the reward of a greedy response to each prompt),
`rewards_by_function` [K, P, G], `judged` [K, P, G] (False where a function returned
None, and its reward is 0) and `reward_weights` [K]. Of R rows of T tokens:
`token_rewards` (the reward on the last token of its response, less a KL penalty),
`mask`, `sequence_ids`, `positions`, `is_prompt`, `logprobs` (of the policy before the
update), `values` (of the critic) and `sum_pi_squared`. Of S = P * G sequences:
`group_ids` (which prompt) and `sequence_baselines`, [S]; and their number. With an
agent: `turn_rewards` [P, G, K] of every turn of the policy, 0 where there is none, and
`num_turns` [P, G]; an estimator may give advantages of the shape of the former."""

ESTIMATOR_NUMBERS = ("gamma", "lam", "normalize_by_std")
"""Numbers of `algorithm` that an estimator may take; the last one is
norm_adv_by_std_in_grpo."""

PREFERENCE_ARRAYS = (
    "chosen_ratios",
    "rejected_ratios",
    "chosen_lengths",
    "rejected_lengths",
)
"""What a loss of DPO may take, one number per pair: log(policy / reference) of the two
responses, and their tokens."""

PREFERENCE_NUMBERS = ("beta", "label_smoothing")
"""Settings of `dpo` that such a loss may take."""

OPTIMIZER_NUMBERS = (
    "learning_rate",
    "b1",
    "b2",
    "eps",
    "weight_decay",
    "mu_dtype",
)
"""What an optimizer may take: the schedule, and settings of `optim`, whose betas are b1
and b2."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A policy loss: a function of arrays [R, T] that returns [R, T]."""

    name: str
    function: str | Callable[..., Any]
    """module:function; of a record that is made from a function, that function."""
    needs: tuple[str, ...]
    """Which of `LOSS_ARRAYS` it takes; `chosen`, if it looks ahead."""
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Numbers that it takes, and the setting that gives each."""
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other keyword arguments, such as of `policy_loss.params`."""
    chosen: str | None = None
    """module:function that chooses tokens over the whole mini-batch, bool [R, T]; takes
    any of `LOOKING_AHEAD`."""
    clipped: str | None = None
    """module:function for the metrics: where a bound has taken the gradient away, and
    where that is the second bound, bool [R, T] each; 0 without one."""
    required: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Settings that have no default, with a value that fits."""
    aggregation: str | None = None
    """The only `loss_agg_mode` that it is defined with, if there is one."""
    weighs_sequences: bool = False
    """Whether its ratio is a whole response's, so that importance weights must be."""

    @property
    def looks_ahead(self) -> bool:
        """Whether log-probabilities of the whole mini-batch come first."""
        return self.chosen is not None


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """From rewards to advantages, [P, G] or [R, T]; with `values`, returns besides."""

    name: str
    function: str | Callable[..., Any]
    """module:function; of a record that is made from a function, that function."""
    needs: tuple[str, ...]
    """Which of `ESTIMATOR_ARRAYS` it takes."""
    parameters: tuple[str, ...] = ()
    """Which of `ESTIMATOR_NUMBERS` it takes."""
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other keyword arguments, such as of `algorithm.adv_params`."""
    group: bool = False
    """Whether it compares the responses of a group, so that one alone gets nothing."""

    @property
    def discounts(self) -> bool:
        """Whether `gamma` is read."""
        return "gamma" in self.parameters

    @property
    def normalises(self) -> bool:
        """Whether it can divide by the group's standard deviation."""
        return "normalize_by_std" in self.parameters

    @property
    def has_critic(self) -> bool:
        """Whether a value model is trained."""
        return "values" in self.needs

    @property
    def asks_greedily(self) -> bool:
        """Whether a greedy response to each prompt is generated besides."""
        return not {"baselines", "sequence_baselines"}.isdisjoint(self.needs)


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


_LOSSES = "jaxrl_llm.algorithms.losses:"
_CHOICES = "jaxrl_llm.algorithms.entropy_covariance:"
_PAIR = ("logprobs", "old_logprobs", "advantages")
_WHERE = ("mask", "sequence_ids", "num_sequences")
_BOUNDS = _same("clip_ratio_low", "clip_ratio_high")

DEFAULT_LOSS, DEFAULT_ESTIMATOR, DEFAULT_OPTIMIZER = "vanilla", "grpo", "adamw"

LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            name="vanilla",
            function=_LOSSES + "clipped_surrogate",
            needs=_PAIR,
            parameters=_BOUNDS | _same("clip_ratio_c"),
            clipped=_LOSSES + "vanilla_clipped",
        ),
        Loss(
            name="dppo_tv",
            function=_LOSSES + "dppo_tv",
            needs=_PAIR,
            parameters=_BOUNDS | _same("clip_ratio_c"),
            clipped=_LOSSES + "dppo_tv_clipped",
        ),
        Loss(
            name="dppo_kl",
            function=_LOSSES + "dppo_kl",
            needs=_PAIR,
            parameters=_BOUNDS | _same("clip_ratio_c"),
            clipped=_LOSSES + "dppo_kl_clipped",
        ),
        Loss(
            name="gspo",
            function=_LOSSES + "gspo",
            needs=(*_PAIR, *_WHERE),
            parameters=_BOUNDS,
            clipped=_LOSSES + "gspo_clipped",
        ),
        Loss(
            name="sapo",
            function=_LOSSES + "sapo",
            needs=_PAIR,
            parameters=_same("tau_pos", "tau_neg"),
            aggregation="seq-mean-token-mean",
        ),
        Loss(
            name="gpg",
            function=_LOSSES + "reinforce",
            needs=("logprobs", "advantages"),
        ),
        Loss(
            name="clip_cov",
            function=_LOSSES + "clip_cov",
            needs=(*_PAIR, "chosen"),
            parameters=_BOUNDS,
            chosen=_CHOICES + "clip_cov",
            clipped=_LOSSES + "clip_cov_clipped",
        ),
        Loss(
            name="kl_cov",
            function=_LOSSES + "kl_cov",
            needs=(*_PAIR, "chosen"),
            parameters=_same("ppo_kl_coef"),
            chosen=_CHOICES + "kl_cov",
        ),
        Loss(
            name="geo_mean",
            function=_LOSSES + "gmpo",
            needs=(*_PAIR, *_WHERE),
            parameters=_BOUNDS,
            clipped=_LOSSES + "gmpo_clipped",
            aggregation="seq-mean-token-mean",
            weighs_sequences=True,
        ),
        Loss(
            name="dro",
            function=_LOSSES + "dro",
            needs=_PAIR,
            parameters={"beta": "dro_beta"},
            required={"dro_beta": 0.05},
        ),
        Loss(
            name="cispo",
            function=_LOSSES + "cispo",
            needs=_PAIR,
            parameters=_BOUNDS,
            clipped=_LOSSES + "cispo_clipped",
        ),
        Loss(
            name="reinforce",
            function=_LOSSES + "reinforce",
            needs=("logprobs", "advantages"),
        ),
    )
}

_ADVANTAGES = "jaxrl_llm.algorithms.advantages:"
_TOKENS = ("mask", "sequence_ids")
_BASELINE = ("token_rewards", "logprobs", "sum_pi_squared", *_TOKENS)

ESTIMATORS = {
    estimator.name: estimator
    for estimator in (
        Estimator(
            name="gae",
            function=_ADVANTAGES + "gae",
            needs=("token_rewards", "values", *_TOKENS),
            parameters=("gamma", "lam"),
        ),
        Estimator(
            name="grpo",
            function=_ADVANTAGES + "grpo",
            needs=("rewards", "lengths"),
            parameters=("normalize_by_std",),
            group=True,
        ),
        Estimator(
            name="grpo_passk",
            function=_ADVANTAGES + "grpo_passk",
            needs=("rewards", "lengths"),
            parameters=("normalize_by_std",),
            group=True,
        ),
        Estimator(
            name="turn_grpo",
            function=_ADVANTAGES + "turn_grpo",
            needs=("turn_rewards", "num_turns"),
            parameters=("gamma", "normalize_by_std"),
            group=True,
        ),
        Estimator(
            name="gdpo",
            function=_ADVANTAGES + "gdpo",
            needs=("rewards_by_function", "reward_weights", "judged", "lengths"),
            parameters=("normalize_by_std",),
            group=True,
        ),
        Estimator(
            name="reinforce_plus_plus",
            function=_ADVANTAGES + "reinforce_plus_plus",
            needs=("token_rewards", *_TOKENS),
            parameters=("gamma",),
        ),
        Estimator(
            name="reinforce_plus_plus_baseline",
            function=_ADVANTAGES + "reinforce_plus_plus_baseline",
            needs=("rewards", "lengths"),
            group=True,
        ),
        Estimator(
            name="rloo",
            function=_ADVANTAGES + "rloo",
            needs=("rewards", "lengths"),
            group=True,
        ),
        Estimator(
            name="opo",
            function=_ADVANTAGES + "opo",
            needs=("rewards", "lengths"),
            group=True,
        ),
        Estimator(
            name="remax",
            function=_ADVANTAGES + "remax",
            needs=("token_rewards", "sequence_baselines", *_TOKENS),
        ),
        Estimator(
            name="gpg",
            function=_ADVANTAGES + "gpg",
            needs=("rewards", "lengths"),
            group=True,
        ),
        Estimator(
            name="optimal_token_baseline",
            function=_ADVANTAGES + "optimal_token_baseline",
            needs=(*_BASELINE, "positions", "is_prompt", "group_ids"),
            group=True,
        ),
        Estimator(
            name="tir_optimal_token_baseline",
            function=_ADVANTAGES + "tir_optimal_token_baseline",
            needs=(*_BASELINE, "group_ids"),
            group=True,
        ),
    )
}

PREFERENCE_LOSSES = {
    name: f"jaxrl_llm.algorithms.preference:{name}"
    for name in ("sigmoid", "hinge", "ipo", "robust")
}
"""Functions from `PREFERENCE_ARRAYS` to one number per pair."""

OPTIMIZERS = {"adamw": "optax:adamw"}
"""Functions that return an optax.GradientTransformation."""


def choice(key: str, name: str, table: Mapping[str, Any]) -> str:
    """`name`, if it is one of a table or of the form module:function.

    Raises:
      ConfigError: it is neither.
    """
    if name in table or ":" in name:
        return name
    raise ConfigError(
        f"{key} is {name!r}{near(name, table)}; known: {', '.join(table)}, or "
        "module:function"
    )
