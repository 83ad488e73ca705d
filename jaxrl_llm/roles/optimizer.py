"""AdamW with a schedule: numbers as of PyTorch's AdamW and Hugging Face's schedules."""

import optax

from jaxrl_llm.config.schema_training import OptimConfig


def make(
    optim: OptimConfig, total_steps: int, updates_per_step: int = 1
) -> optax.GradientTransformation:
    """Clips the global norm of the gradient, then AdamW, as veRL does.

        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g^2
        p = p - lr * (m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) + weight_decay * p)

    Every parameter decays, norms and biases too. Arguments as in `schedule`.

    Source: Loshchilov and Hutter 2019, algorithm 2 (arXiv:1711.05101).
    """
    b1, b2 = optim.betas
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_grad),
        optax.adamw(
            schedule(optim, total_steps, updates_per_step),
            b1=b1,
            b2=b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mu_dtype=optim.mu_dtype,
        ),
    )


def schedule(
    optim: OptimConfig, total_steps: int, updates_per_step: int = 1
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
    warmup, lr = optim.lr_warmup_steps, optim.lr
    decay_steps = max(1, total_steps - warmup)
    match optim.lr_scheduler_type:
        case "constant":
            after = optax.constant_schedule(lr)
        case "linear":
            after = optax.linear_schedule(lr, lr * optim.min_lr_ratio, decay_steps)
        case "cosine":
            after = optax.cosine_decay_schedule(lr, decay_steps, optim.min_lr_ratio)
    if warmup:
        rising = optax.linear_schedule(0.0, lr, warmup)
        after = optax.join_schedules([rising, after], [warmup])
    return lambda updates: after(updates // updates_per_step)
