"""The algorithm's part of a configuration, and which combinations have no meaning.

Keys that share veRL's name keep veRL's meaning and default. Nothing here imports JAX:
the command line reads configurations before it does.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Estimator = Literal[
    "gae",
    "grpo",
    "grpo_passk",
    "gdpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "opo",
    "remax",
    "gpg",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
]
LossMode = Literal[
    "vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov",
    "geo_mean", "dro", "cispo", "reinforce",
]  # fmt: skip
Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
KlEstimator = Literal[
    "k1", "k2", "k3", "abs", "kl", "mse", "low_var_kl",
    "k1+", "k2+", "k3+", "abs+", "kl+", "mse+", "low_var_kl+",
]  # fmt: skip
_REJECTIONS = (
    "token_k1", "token_k2", "token_k3",
    "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3",
    "seq_max_k2", "seq_max_k3",
)  # fmt: skip
Bounds = tuple[float | None, float]

_WITHOUT_GROUP = ("gae", "reinforce_plus_plus", "remax")
_DISCOUNTING = ("gae", "reinforce_plus_plus")
_NORMALIZING = ("grpo", "grpo_passk", "gdpo")


class Section(BaseModel):
    """What all sections of a configuration have in common."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class PolicyLossConfig(Section):
    """Which policy loss, and the numbers that only one of them has."""

    loss_mode: LossMode = "vanilla"
    """vanilla: PPO's clipped surrogate. The others: see ALGORITHMS.md."""
    clip_cov_ratio: float = Field(0.0002, gt=0, le=1)
    """clip_cov: share of the tokens that lose their gradient, at most."""
    clip_cov_lb: float = 1.0
    """clip_cov: only tokens whose covariance is over it,"""
    clip_cov_ub: float = 5.0
    """clip_cov: and under this."""
    kl_cov_ratio: float = Field(0.0002, gt=0, le=1)
    """kl_cov: share of the tokens that are held back."""
    ppo_kl_coef: float = Field(0.1, ge=0)
    """kl_cov: how strongly."""
    dro_beta: float | None = Field(None, gt=0)
    """dro: weight of the squared log-ratio. dro needs it."""

    @model_validator(mode="after")
    def _check(self) -> "PolicyLossConfig":
        if self.loss_mode == "dro" and self.dro_beta is None:
            raise ValueError("loss_mode is dro, which needs dro_beta, such as 0.05")
        return self


class RolloutCorrectionConfig(Section):
    """Against the difference between the sampler's and the trainer's probabilities.

    An empty section corrects nothing and measures the mismatch (rollout_corr/*).
    """

    rollout_is: Literal["token", "sequence"] | None = None
    """Importance weights trainer / sampler of tokens, or of whole responses."""
    rollout_is_threshold: float | str = 2.0
    """A number: larger weights are cut down to it. "LOWER_UPPER": weights outside
    become 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean over the mini-batch."""
    rollout_rs: str | None = None
    """Rejections, separated by commas: token_k1, seq_mean_k3 and so on. A token must
    pass all of them."""
    rollout_rs_threshold: float | str | None = None
    """For each rejection, separated by commas, or one for all. k2 and k3: the largest
    divergence. k1: "LOWER_UPPER" bounds of the ratio trainer / sampler, or UPPER for
    1/UPPER to UPPER."""
    bypass_mode: bool = False
    """Centre the trust region on the sampler's log-probabilities instead of computing
    the trainer's before the update."""
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """bypass_mode only. ppo_clip: the clipped ratio corrects, without weights.
    reinforce: the policy gradient with the weights."""

    @property
    def is_bounds(self) -> Bounds:
        """(lower or None, upper) of importance weights."""
        return _bounds("rollout_is_threshold", self.rollout_is_threshold)

    @property
    def rejections(self) -> tuple[tuple[str, Bounds], ...]:
        """Every rejection with its (lower or None, upper)."""
        kinds = _split(self.rollout_rs)
        given = _split(self.rollout_rs_threshold)
        if kinds and len(given) not in (1, len(kinds)):
            raise ValueError(
                f"rollout_rs_threshold is {self.rollout_rs_threshold!r} but rollout_rs "
                f"has {len(kinds)} entries; give 1 or {len(kinds)}"
            )
        given = given if len(given) == len(kinds) else given * len(kinds)
        return tuple(
            (kind, _rejection_bounds(kind, text))
            for kind, text in zip(kinds, given[: len(kinds)], strict=True)
        )

    @model_validator(mode="after")
    def _check(self) -> "RolloutCorrectionConfig":
        for kind in _split(self.rollout_rs):
            if kind not in _REJECTIONS:
                known = ", ".join(_REJECTIONS)
                raise ValueError(f"rollout_rs has {kind!r}; known: {known}")
        if self.rollout_rs_threshold is not None and not _split(self.rollout_rs):
            raise ValueError("rollout_rs_threshold is given but rollout_rs is not")
        _ = self.is_bounds, self.rejections
        if self.rollout_is_batch_normalize and self.rollout_is is None:
            raise ValueError(
                "rollout_is_batch_normalize is on but there are no weights; set "
                "rollout_is to token or sequence"
            )
        if self.loss_type == "reinforce" and not self.bypass_mode:
            raise ValueError(
                "loss_type is reinforce, which is bypass_mode's; set bypass_mode, or "
                "actor.policy_loss.loss_mode=reinforce"
            )
        return self


class KlCtrlConfig(Section):
    """The weight of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: changed after every step to keep the KL near `target_kl`."""
    kl_coef: float = Field(0.001, ge=0)
    """The weight; with adaptive, of the first step."""
    target_kl: float = Field(0.1, gt=0)
    """adaptive: KL per token, nats."""
    horizon: float = Field(1e4, gt=0)
    """adaptive: responses over which the weight changes by at most a fifth."""


class FilterGroupsConfig(Section):
    """DAPO's dynamic sampling: train only on groups whose responses differ in worth."""

    metric: str = "reward"
    """What must differ: the reward, or the score of the reward function of that
    name."""
    max_num_gen_batches: int = Field(10, ge=0)
    """Batches to generate for one step before giving up; 0: no limit."""


class PfPpoConfig(Section):
    """gae: train on responses drawn again by their reward (PF-PPO)."""

    reweight_method: Literal["pow", "max_min", "max_random"] = "pow"
    """How likely a response is drawn; see `advantages.pf_ppo_weights`."""
    weight_pow: float = Field(2.0, gt=0)
    """pow: the exponent of |reward|."""


class AlgorithmConfig(Section):
    """From rewards to advantages."""

    adv_estimator: Estimator = "grpo"
    """See ALGORITHMS.md."""
    norm_adv_by_std_in_grpo: bool = True
    """grpo, grpo_passk, gdpo: divide by the group's standard deviation (GRPO) or not
    (Dr. GRPO)."""
    gamma: float = Field(1.0, ge=0, le=1)
    """gae, reinforce_plus_plus: discount per token."""
    lam: float = Field(1.0, ge=0, le=1)
    """gae: 1 looks at the whole rest of the response (unbiased), 0 only at the next
    value."""
    use_kl_in_reward: bool = False
    """Keep the initial weights as reference, and take kl_ctrl.kl_coef * KL off every
    token's reward."""
    kl_penalty: KlEstimator = "k1"
    """use_kl_in_reward: estimator of the KL, as actor.kl_loss_type."""
    kl_ctrl: KlCtrlConfig = KlCtrlConfig()
    filter_groups: FilterGroupsConfig | None = None
    """Off if not given."""
    pf_ppo: PfPpoConfig | None = None
    """Off if not given."""
    rollout_correction: RolloutCorrectionConfig | None = None
    """Off if not given."""


def misfits(config) -> Iterator[str]:
    """Combinations of a `Config`'s algorithm that make no run, with what would fit."""
    algorithm, actor, rollout = config.algorithm, config.actor, config.rollout
    estimator, mode = algorithm.adv_estimator, actor.policy_loss.loss_mode
    if rollout.n == 1 and estimator not in _WITHOUT_GROUP:
        yield (
            f"rollout.n is 1 but algorithm.adv_estimator={estimator} compares the "
            f"responses of a group; use at least 2, or {', '.join(_WITHOUT_GROUP)}"
        )
    if algorithm.gamma != 1 and estimator not in _DISCOUNTING:
        yield (
            f"algorithm.gamma is {algorithm.gamma} but algorithm.adv_estimator="
            f"{estimator} does not discount; use gamma 1, or one of "
            f"{', '.join(_DISCOUNTING)}"
        )
    if not algorithm.norm_adv_by_std_in_grpo and estimator not in _NORMALIZING:
        yield (
            "algorithm.norm_adv_by_std_in_grpo is false, but algorithm.adv_estimator="
            f"{estimator} does not divide by a deviation; use one of "
            f"{', '.join(_NORMALIZING)}"
        )
    if algorithm.filter_groups and rollout.n == 1:
        yield (
            "algorithm.filter_groups is given but rollout.n is 1, and one response "
            "alone never differs; use at least 2"
        )
    if estimator == "gdpo" and algorithm.use_kl_in_reward:
        yield (
            "algorithm.use_kl_in_reward has no meaning with algorithm.adv_estimator="
            "gdpo, which reads each reward function by itself; set actor.use_kl_loss"
        )
    if algorithm.kl_ctrl != KlCtrlConfig() and not algorithm.use_kl_in_reward:
        yield "algorithm.kl_ctrl needs algorithm.use_kl_in_reward: true"
    refresh = actor.ref_refresh_steps
    if refresh is not None and not uses_kl(config):
        yield (
            f"actor.ref_refresh_steps is {refresh}, but neither actor.use_kl_loss nor "
            "algorithm.use_kl_in_reward keeps a reference"
        )
    if mode in ("sapo", "geo_mean") and actor.loss_agg_mode != "seq-mean-token-mean":
        yield (
            f"actor.policy_loss.loss_mode is {mode}, a mean over responses; set "
            f"actor.loss_agg_mode=seq-mean-token-mean, got {actor.loss_agg_mode}"
        )
    if actor.loss_scale_factor and actor.loss_agg_mode != "seq-mean-token-sum-norm":
        yield (
            f"actor.loss_scale_factor is {actor.loss_scale_factor} but only "
            f"actor.loss_agg_mode=seq-mean-token-sum-norm reads it"
        )
    correction = algorithm.rollout_correction
    if correction and correction.bypass_mode and mode != "vanilla":
        yield (
            f"algorithm.rollout_correction.bypass_mode brings its own loss; set "
            f"actor.policy_loss.loss_mode=vanilla, got {mode}"
        )
    if correction and correction.rollout_is and estimator.endswith("token_baseline"):
        yield (
            f"algorithm.adv_estimator={estimator} is not defined with importance "
            "weights here; set algorithm.rollout_correction.rollout_is=null"
        )
    yield from _critic_misfits(config)


def uses_kl(config) -> bool:
    """Whether a reference policy is kept."""
    return config.actor.use_kl_loss or config.algorithm.use_kl_in_reward


def _critic_misfits(config) -> Iterator[str]:
    """The same, of what has a meaning only with a critic, or none with one."""
    critic, algorithm, trainer = config.critic, config.algorithm, config.trainer
    if algorithm.adv_estimator != "gae":
        needs = f"needs algorithm.adv_estimator=gae, not {algorithm.adv_estimator}"
        if critic != type(critic)():
            yield f"critic: a critic {needs}"
        if algorithm.lam != 1:
            yield f"algorithm.lam is {algorithm.lam}, which {needs}"
        if algorithm.pf_ppo:
            yield f"algorithm.pf_ppo {needs}"
        if trainer.critic_warmup:
            yield f"trainer.critic_warmup is {trainer.critic_warmup}, which {needs}"
        return
    steps = trainer.total_training_steps
    if trainer.critic_warmup >= steps:
        yield (
            f"trainer.critic_warmup is {trainer.critic_warmup}, but with "
            f"trainer.total_training_steps {steps} the policy would never be updated"
        )
    mini, batch = critic.ppo_mini_batch_size, config.data.train_batch_size
    if mini is not None and mini > batch:
        yield (
            f"critic.ppo_mini_batch_size is {mini} prompts but data.train_batch_size "
            f"is only {batch}; use at most {batch}"
        )
    if critic.optim.lr_warmup_steps > steps:
        yield (
            f"critic.optim.lr_warmup_steps is {critic.optim.lr_warmup_steps} but "
            f"trainer.total_training_steps is {steps}"
        )
    if critic.model.revision is not None and critic.model.path is None:
        yield "critic.model.revision needs critic.model.path"


def _split(given: float | str | None) -> list[str]:
    return [part.strip() for part in str(given or "").split(",") if part.strip()]


def _bounds(key: str, given: float | str) -> Bounds:
    """Raises ValueError unless it is UPPER or LOWER_UPPER, positive and in order."""
    lower, _, upper = str(given).rpartition("_")
    try:
        found = (float(lower) if lower else None), float(upper)
    except ValueError:
        raise ValueError(f"{key} is {given!r}; expected UPPER or LOWER_UPPER") from None
    if not 0 < (found[1] if found[0] is None else found[0]) <= found[1]:
        raise ValueError(f"{key} is {given!r}; bounds are positive and in order")
    return found


def _rejection_bounds(kind: str, text: str) -> Bounds:
    key = f"rollout_rs_threshold of {kind}"
    lower, upper = _bounds(key, text)
    if kind.endswith("k1"):
        if lower is None:
            lower, upper = min(1 / upper, upper), max(1 / upper, upper)
        return lower, upper
    if lower is not None:
        raise ValueError(f"{key} is {text!r}; a divergence has only an UPPER bound")
    return lower, upper
