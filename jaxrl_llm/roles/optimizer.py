"""An optax optimizer with a schedule: numbers as of PyTorch's AdamW and Hugging Face's
schedules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrl_llm import models
from jaxrl_llm.config import plugins
from jaxrl_llm.config.algorithm import DEFAULT_OPTIMIZER


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of an optimizer and its schedule, by PyTorch's names for AdamW's."""

    lr: float
    name: str = DEFAULT_OPTIMIZER
    """One of `config.algorithm.OPTIMIZERS`, or module:function."""
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other keyword arguments of it."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    """Gradients are scaled down to this global norm."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = 0
    min_lr_ratio: float = 0.0


def make(
    settings: Settings, total_steps: int, updates_per_step: int = 1
) -> optax.GradientTransformation:
    """Clips the global norm of the gradient, as veRL does, then the optimizer that
    `settings` name: with adamw

        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g^2
        p = p - lr * (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay * p)

    Every parameter decays, norms and biases too; only what `models.is_fixed` stays as
    it is. Another one is given what it takes by
    name of learning_rate (`schedule`), b1, b2, eps, weight_decay and mu_dtype.

    Args:
      total_steps, updates_per_step: as in `schedule`.

    Raises:
      ConfigError: there is no such optimizer, or it asks for what it cannot get.

    Source: Loshchilov and Hutter 2019, algorithm 2 (arXiv:1711.05101).
    """
    function = plugins.optimizer("optim", settings.name, settings.params)
    given = {
        "learning_rate": schedule(settings, total_steps, updates_per_step),
        "b1": settings.betas[0],
        "b2": settings.betas[1],
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
        "mu_dtype": settings.mu_dtype,
    }
    made = optax.chain(
        optax.clip_by_global_norm(settings.clip_grad),
        plugins.call(function, given, settings.params),
    )

    def update(grads, state, params=None):
        updates, state = made.update(grads, state, params)
        return jax.tree.map_with_path(_unless_fixed, updates), state

    return optax.GradientTransformation(made.init, update)


def _unless_fixed(path: tuple, update: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return jnp.zeros_like(update) if models.is_fixed(name) else update


def schedule(
    settings: Settings, total_steps: int, updates_per_step: int = 1
) -> optax.Schedule:
    """Learning rate as a function of how many updates have been made.

    All updates of a training step have the same rate. With w = lr_warmup_steps, step s
    from 0 has lr * s / w while s < w (the very first update of a warm-up changes
    nothing), then, with t = (s - w) / (total_steps - w) and m = min_lr_ratio:

        constant   lr
        linear     lr * (m + (1 - m) * (1 - t))
        cosine     lr * (m + (1 - m) * (1 + cos(pi * t)) / 2)

    Args:
      total_steps: training steps of the run, at the end of which t = 1.
      updates_per_step: optimizer updates in one training step.

    Source: `get_*_schedule_with_warmup` of transformers; `min_lr_ratio` is veRL's.
    """
    warmup, lr = settings.lr_warmup_steps, settings.lr
    decay_steps = max(1, total_steps - warmup)
    match settings.lr_scheduler_type:
        case "constant":
            after = optax.constant_schedule(lr)
        case "linear":
            after = optax.linear_schedule(lr, lr * settings.min_lr_ratio, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(lr, decay_steps, settings.min_lr_ratio)
    if warmup:
        rising = optax.linear_schedule(0.0, lr, warmup)
        after = optax.join_schedules([rising, after], [warmup])
    return lambda updates: after(updates // updates_per_step)
