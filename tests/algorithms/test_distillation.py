"""Divergences of student and teacher: TRL's numbers, and float64 formulas of NumPy.

golden/golden_trl_1.16.0_gkd.json is what tests/support/golden_gkd.py prints: loss and
gradient of TRL's GKDTrainer.generalized_jsd_loss on random logits.
"""

import functools
import json
import pathlib

import golden_gkd
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxrl_llm.algorithms import distillation, masked

GOLDEN = json.loads(
    (
        pathlib.Path(__file__).parents[1] / "golden/golden_trl_1.16.0_gkd.json"
    ).read_text()
)
R, T, D, WIDER, V, K = 3, 10, 4, 6, 11, 3
POSITIONS = jnp.array([range(10), [0, 1, 2, 3, 0, 1, 2, 0, 0, 0], [0] * 10])
MASK = jnp.array(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 1, 1, 0, 0, 0],
        [0] * 10,
    ],
    bool,
)
WEIGHTS = np.asarray(MASK) * np.linspace(0.5, 1.5, R * T).reshape(R, T)
TEMPERATURE, CAP = 0.7, 3.0
RNG = np.random.default_rng(0)
HIDDEN, TEACHERS = RNG.normal(size=(R, T, D)), RNG.normal(size=(R, T, WIDER))
MATRIX, TEACHERS_MATRIX = RNG.normal(size=(V, D)), RNG.normal(size=(V, WIDER))
TOKENS = RNG.integers(0, V, (R, T))


def shifted(x):
    return np.roll(x, 1, axis=1)


def numbers_of_trl(student, teacher, labels, temperature):
    """What `golden_gkd.found` returns, by the functions here."""
    labels = jnp.array(labels)

    def loss(student, beta):
        divergence = distillation.generalized_jsd(
            student / temperature, jnp.array(teacher) / temperature, beta
        )
        return masked.token_mean(divergence, labels != -100)

    made = {}
    for beta in golden_gkd.BETAS:
        found, gradient = jax.value_and_grad(loss)(jnp.array(student), beta)
        made[str(beta)] = {"loss": found, "gradient": gradient}
    return made


def same(got, wanted):
    for beta in wanted:
        for name, values in wanted[beta].items():
            np.testing.assert_allclose(
                got[beta][name], values, rtol=1e-5, atol=1e-6, err_msg=f"{beta} {name}"
            )


def test_the_generalised_jsd_and_its_gradient_are_trls():
    same(numbers_of_trl(**GOLDEN["inputs"]), GOLDEN["jsd"])


@pytest.mark.slow
def test_the_generalised_jsd_is_that_of_the_installed_trl():
    pytest.importorskip("trl.experimental.gkd")
    given = GOLDEN["inputs"] | {"temperature": 1.3}
    same(numbers_of_trl(**given), golden_gkd.found(**given))


def jsd(z, log_p, beta):
    """Divergence and its gradient in the logits z, float64."""
    log_q = log_softmax(z, axis=-1)
    p, q = np.exp(log_p), np.exp(log_q)
    if beta in (0, 1):
        value = p * (log_p - log_q) if beta == 0 else q * (log_q - log_p)
        slope = -p / q if beta == 0 else log_q - log_p
    else:
        log_m = np.log(beta * p + (1 - beta) * q)
        value = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        slope = (1 - beta) * (log_q - log_m)
    mean = (q * slope).sum(axis=-1, keepdims=True)
    return value.sum(axis=-1), q * (slope - mean)


def topk_kl(z, log_p, k=K):
    """Divergence of the k + 1 classes and its gradient in the logits z, float64."""
    log_q = log_softmax(z, axis=-1)
    ids = np.argsort(-log_p, axis=-1)[..., :k]
    is_top = (ids[..., None] == np.arange(z.shape[-1])).any(axis=-2)
    p, q = np.exp(log_p), np.exp(log_q)
    P, Q = (np.where(is_top, 0, x).sum(axis=-1, keepdims=True) for x in (p, q))
    value = np.where(is_top, p * (log_p - log_q), 0).sum(axis=-1)
    target = np.where(is_top, p, q * P / Q)
    return value + (P * np.log(P / Q))[..., 0], q - target


def capped(hidden, matrix):
    """Logits at the temperature, and their derivative by the products, float64."""
    raw = shifted(hidden) @ matrix.T
    capped = CAP * np.tanh(raw / CAP)
    return capped / TEMPERATURE, (1 - (capped / CAP) ** 2) / TEMPERATURE


@functools.partial(jax.jit, static_argnames=("mode", "chunk"))
def ours(hidden, matrix, mode, chunk):
    """Weighted sum, what was found, and gradients in hidden states and matrix."""
    how = {"temperature": TEMPERATURE, "chunk": chunk}
    teacher = jnp.array(TEACHERS, "float32"), jnp.array(TEACHERS_MATRIX, "float32")
    asked = jnp.array(TOKENS), POSITIONS, MASK

    def loss(hidden, matrix):
        if mode == "topk":
            said = distillation.taught(*teacher, *asked, topk=K, **how)
            found = distillation.with_topk(
                hidden, matrix, *asked, said, logit_softcap=CAP, **how
            )
        else:
            found = distillation.with_teacher(
                hidden, matrix, *asked, teacher=teacher, beta=mode,
                logit_softcap=CAP, entropy_gradient=False, **how,
            )  # fmt: skip
        return jnp.sum(jnp.array(WEIGHTS) * found.divergence), found

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, matrix)


@pytest.mark.parametrize(
    "mode",
    ["topk", *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 0.3, 1.0))],
)
def test_in_chunks_the_divergence_and_its_gradient_are_those_of_whole_rows(mode):
    logits, slope = capped(HIDDEN, MATRIX)
    log_p = log_softmax(shifted(TEACHERS) @ TEACHERS_MATRIX.T / TEMPERATURE, axis=-1)
    formula = topk_kl if mode == "topk" else functools.partial(jsd, beta=mode)
    value, gradient = formula(logits, log_p)
    d_raw = WEIGHTS[..., None] * gradient * slope
    d_matrix = np.einsum("rtv,rtd->vd", d_raw, shifted(HIDDEN))
    d_hidden = np.roll(d_raw @ MATRIX, -1, axis=1)
    log_q = log_softmax(logits, axis=-1)
    own = np.take_along_axis(log_q, TOKENS[..., None], axis=-1)[..., 0]
    teachers = np.take_along_axis(log_p, TOKENS[..., None], axis=-1)[..., 0]
    wanted = {
        "divergence": value,
        "logprobs": own,
        "entropy": -(np.exp(log_q) * log_q).sum(axis=-1),
        "teacher_logprobs": teachers,
        "teacher_entropy": -(np.exp(log_p) * log_p).sum(axis=-1),
    }
    if mode == "topk":
        ids = np.argsort(-log_p, axis=-1)[..., :K]
        for name, logp in (("student_mass", log_q), ("teacher_mass", log_p)):
            wanted[name] = np.exp(np.take_along_axis(logp, ids, axis=-1)).sum(axis=-1)
    hidden, matrix = jnp.array(HIDDEN, jnp.float32), jnp.array(MATRIX, jnp.float32)
    whole = None
    for chunk in (1000, 18):  # everything at once; a few tokens of a row at a time
        (total, found), grads = ours(hidden, matrix, mode, chunk)
        np.testing.assert_allclose(total, (WEIGHTS * value).sum(), rtol=1e-5)
        for name, of_all in wanted.items():
            np.testing.assert_allclose(
                getattr(found, name), np.where(MASK, of_all, 0), rtol=1e-5, atol=2e-6
            )
        np.testing.assert_allclose(grads[0], d_hidden, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads[1], d_matrix, rtol=1e-4, atol=1e-5)
        whole = whole or (total, *grads)
        for got, first in zip((total, *grads), whole, strict=True):
            np.testing.assert_allclose(got, first, rtol=1e-6, atol=1e-6)


def test_the_tail_class_is_counted():
    # Teacher 1/2, 1/4, 1/8, 1/8; student uniform; the top 2, and 1/4 for the rest.
    p = np.array([0.5, 0.25, 0.125, 0.125])
    got = distillation.forward_kl_topk(
        jnp.zeros(4), jnp.array([0, 1]), jnp.log(jnp.array(p[:2]))
    )
    wanted = 0.5 * np.log(2) + 0.25 * np.log(1) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    # A teacher that knows: nothing is left, and a student far off costs no infinity.
    sure, gradient = jax.value_and_grad(distillation.forward_kl_topk)(
        jnp.array([0.0, 150.0, 0.0]), jnp.array([1]), jnp.log(jnp.array([0.5]))
    )
    np.testing.assert_allclose(sure, 75 - 1.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.25, 0.5, -0.25], atol=1e-6)
    sure = distillation.forward_kl_topk(
        jnp.array([0.0, 50.0, 0.0]), jnp.array([0]), jnp.zeros(1)
    )
    np.testing.assert_allclose(sure, 50.0, rtol=1e-6)


def test_the_reverse_kl_is_the_students_surprise_at_its_teacher():
    found = distillation.reverse_kl(jnp.array([[-1.0]]), jnp.array([[-3.0]]))
    assert found == 2.0  # the student is too sure: a negative advantage
