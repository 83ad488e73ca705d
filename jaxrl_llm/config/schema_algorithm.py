"""The algorithm's sections of a configuration.

Keys that share veRL's name keep veRL's meaning and default.
"""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxrl_llm.config.algorithm import (
    DEFAULT_ESTIMATOR,
    DEFAULT_LOSS,
    ESTIMATORS,
    LOSSES,
    choice,
)
from jaxrl_llm.config.names import REJECTIONS, Bounds, KlEstimator
from jaxrl_llm.config.section import Section


class PolicyLossConfig(Section):
    """Which policy loss, and the numbers that only one of them has."""

    loss_mode: str = Field(
        DEFAULT_LOSS,
        description=f"{', '.join(LOSSES)}: see ALGORITHMS.md. Or module:function, "
        "which takes by name what it needs and returns the loss of each token.",
    )
    params: dict[str, Any] = {}
    """Other keyword arguments of the loss."""
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

    @field_validator("loss_mode")
    @classmethod
    def _known(cls, name: str) -> str:
        return choice("loss_mode", name, LOSSES)

    @model_validator(mode="after")
    def _check(self) -> "PolicyLossConfig":
        required = LOSSES[self.loss_mode].required if self.loss_mode in LOSSES else {}
        for key, example in required.items():
            if getattr(self, key) is None:
                raise ValueError(
                    f"loss_mode is {self.loss_mode}, which needs {key}, such as "
                    f"{example}"
                )
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
            if kind not in REJECTIONS:
                known = ", ".join(REJECTIONS)
                raise ValueError(f"rollout_rs has {kind!r}; known: {known}")
        if self.rollout_rs_threshold is not None and not _split(self.rollout_rs):
            raise ValueError("rollout_rs_threshold is given but rollout_rs is not")
        _ = self.is_bounds, self.rejections
        if self.rollout_is_batch_normalize and self.rollout_is is None:
            raise ValueError(
                "rollout_is_batch_normalize is on but there are no weights; set "
                "rollout_is to token or sequence"
            )
        if self.loss_type != "ppo_clip" and not self.bypass_mode:
            raise ValueError(
                f"loss_type is {self.loss_type}, which is bypass_mode's; set "
                f"bypass_mode, or actor.policy_loss.loss_mode={self.loss_type}"
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
    """What must differ: the reward, the score of the reward function of that name, or
    another number that a function returns in its dictionary, such as acc."""
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

    adv_estimator: str = Field(
        DEFAULT_ESTIMATOR,
        description=f"{', '.join(ESTIMATORS)}: see ALGORITHMS.md. Or module:function, "
        "which takes by name what it needs and returns advantages.",
    )
    adv_params: dict[str, Any] = {}
    """Other keyword arguments of the estimator."""
    norm_adv_by_std_in_grpo: bool = True
    """grpo, grpo_passk, gdpo: divide by the group's standard deviation (GRPO) or not
    (Dr. GRPO)."""
    gamma: float = Field(1.0, ge=0, le=1)
    """gae, reinforce_plus_plus: discount per token."""
    lam: float = Field(1.0, ge=0, le=1)
    """gae: 1 looks at the whole rest of the response (unbiased), 0 only at the next
    value."""
    mask_truncated_completions: bool = False
    """Learn nothing from responses that reached rollout.max_response_length (DAPO's
    overlong filtering): their rewards count in the group, their tokens in no loss."""
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

    @field_validator("adv_estimator")
    @classmethod
    def _known(cls, name: str) -> str:
        return choice("adv_estimator", name, ESTIMATORS)


def _split(given: float | str | None) -> list[str]:
    return [part.strip() for part in str(given or "").split(",") if part.strip()]


def _bounds(key: str, given: float | str) -> Bounds:
    """Raises ValueError unless it is UPPER or LOWER_UPPER, positive and in order."""
    lower, _, upper = str(given).rpartition("_")
    try:
        found = (float(lower) if lower else None), float(upper)
    except ValueError:
        raise ValueError(f"{key} is {given!r}; expected UPPER or LOWER_UPPER") from None
    lowest = found[1] if found[0] is None else found[0]
    if not 0 < lowest <= found[1] < math.inf:
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
