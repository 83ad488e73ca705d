import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.roles import optimizer
from jaxrl_llm.roles.optimizer import Settings


def rates(count, total_steps, updates_per_step=1, **fields):
    schedule = optimizer.schedule(Settings(**fields), total_steps, updates_per_step)
    return [float(schedule(jnp.int32(i))) for i in range(count)]


def test_constant_after_warm_up_from_zero():
    got = rates(6, 10, lr=4.0, lr_warmup_steps=4)
    np.testing.assert_allclose(got, [0, 1, 2, 3, 4, 4])


def test_linear_ends_at_the_minimum():
    # Warm-up 0 1/2, then 1 - 0.8 t with t = 0 1/4 1/2 3/4 1, and stays there.
    got = rates(
        8,
        6,
        lr=1.0,
        lr_warmup_steps=2,
        lr_scheduler_type="linear",
        min_lr_ratio=0.2,
    )
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)


def test_cosine_ends_at_the_minimum():
    # (1 + cos(pi t)) / 2 at t = 0 1/3 2/3 1 is 1 3/4 1/4 0; half of it on top of half.
    got = rates(5, 3, lr=2.0, lr_scheduler_type="cosine", min_lr_ratio=0.5)
    np.testing.assert_allclose(got, [2, 1.75, 1.25, 1, 1], rtol=1e-6)


def test_a_warm_up_as_long_as_the_run():
    for kind in ("constant", "linear", "cosine"):
        got = rates(3, 3, lr=3.0, lr_warmup_steps=3, lr_scheduler_type=kind)
        np.testing.assert_allclose(got, [0, 1, 2], rtol=1e-6)


def test_the_updates_of_a_training_step_share_a_rate():
    got = rates(6, 10, updates_per_step=2, lr=4.0, lr_warmup_steps=4)
    np.testing.assert_allclose(got, [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_equal_hugging_face_s(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = transformers.get_scheduler(
        name, torch_optimizer, num_warmup_steps=3, num_training_steps=10
    )
    expected = []
    for _ in range(10):
        expected += theirs.get_last_lr()
        torch_optimizer.step()
        theirs.step()
    got = rates(10, 10, lr=0.1, lr_warmup_steps=3, lr_scheduler_type=kind)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)


def test_five_updates_equal_the_equations():
    optim = Settings(
        lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, clip_grad=1.5
    )
    transformation = optimizer.make(optim, total_steps=5)
    params = {"scale": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    state = transformation.init(params)
    p, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for n in range(1, 6):
        g = np.array([0.3 * n, -1.0, 0.1]) * n
        grads = {"scale": jnp.float32(g[:2]), "bias": jnp.float32(g[2:])}
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)

        g = g * min(1.0, 1.5 / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = m / (1 - 0.8**n) / (np.sqrt(v / (1 - 0.9**n)) + 1e-3)
        p = p - 0.1 * (step + 0.2 * p)
    got = np.concatenate([params["scale"], params["bias"]])
    np.testing.assert_allclose(got, p, rtol=1e-5)


def test_five_updates_equal_torch_adamw():
    torch = pytest.importorskip("torch")
    optim = Settings(lr=0.05, weight_decay=0.1, clip_grad=1.0)
    start = np.float32([1.0, -2.0, 0.5])
    theirs = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1)
    transformation, params = optimizer.make(optim, total_steps=5), jnp.array(start)
    state = transformation.init(params)
    for n in range(1, 6):
        grads = jax.random.normal(jax.random.key(n), (3,))
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(np.array(grads))
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adamw.step()
    np.testing.assert_allclose(params, theirs.detach().numpy(), rtol=1e-5)


def test_a_first_moment_in_bfloat16_is_half_as_large_and_a_little_off():
    def after_three(mu_dtype):
        made = optimizer.make(Settings(lr=0.1, mu_dtype=mu_dtype), 10)
        params = jnp.linspace(0.1, 1.0, 64)
        state = made.init(params)
        for _ in range(3):
            updates, state = made.update(jnp.sin(9 * params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state[1][0].mu

    (got, mu), (wanted, exact) = map(after_three, ("bfloat16", "float32"))
    assert (mu.nbytes, exact.nbytes) == (128, 256)
    assert 0 < jnp.max(jnp.abs(got - wanted)) < 2**-8 * 0.3  # of three steps of 0.1
