"""A whole run: the loop, and what it returns. The only place where learning meets
generation.

    from jaxrl_llm import train
    result = train("Qwen/Qwen2.5-0.5B-Instruct", rows, reward=f, steps=50)
    result.plot()
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxrl_llm.algorithms import advantages, kl, ppo
from jaxrl_llm.config import plugins
from jaxrl_llm.data.rows import TrainBatch
from jaxrl_llm.sharding import processes
from jaxrl_llm.tracking.result import Result, _shown
from jaxrl_llm.tracking.run_log import Records
from jaxrl_llm.training import credit as estimate
from jaxrl_llm.training import evaluate
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.experience import (
    ORDER,
    RESAMPLE,
    VALIDATION,
    Groups,
    collect,
    seed,
)


def run(job: Job) -> "Result":
    """Trains to the end, or until SIGTERM or Ctrl-C asks for an early one.

    Raises:
      RewardError: a reward function failed and `reward.on_error` is "raise".
    """
    config, engine = job.config, job.engine
    with (
        closing(engine),
        Records(config, job.source, job.data) as records,
        _asked_to_stop() as stopping,
    ):
        state, first_step = records.open(abstract_state(job), lambda: start(job))
        sent = engine.load(state.actor.params, first_step)
        if first_step == 0:
            records.write(0, sent, validate(job, records, 0))
        for step in range(first_step + 1, config.trainer.total_training_steps + 1):
            records.begin(step)
            groups = collect(config, engine, job.score, records, step)
            state, rows, credited = assign_credit(job, records, state, groups, step)
            state, learned = update(job, records, state, rows, step)
            with records.phase("update_weights"):
                sent = engine.load(state.actor.params, step)
            validation = validate(job, records, step)
            records.write(step, {**credited, **learned, **sent}, validation)
            stop = any(processes.gather(stopping()))
            records.save(step, state, validation, stop)
            if stop:
                break
        records.close(state)
    return _shown(Result(Path(config.output_dir)), config)


def start(job: Job) -> ppo.TrainState:
    """The state before the first step. Reads the weights."""
    config, actor = job.config, job.learner.start()
    coef, reference = None, None
    if config.algorithm.use_kl_in_reward:
        coef = np.float32(config.algorithm.kl_ctrl.kl_coef)
        coef = processes.place(coef, actor.step.sharding)
    if config.actor.ref_refresh_steps:
        reference = job.learner.read_reference()
    critic = job.critic and job.critic.start()
    return ppo.TrainState(actor, critic, coef, reference)


def abstract_state(job: Job) -> ppo.TrainState:
    """Shapes, dtypes and shardings of the state."""
    config, actor = job.config, job.learner.abstract_state()
    coef, reference = None, None
    if config.algorithm.use_kl_in_reward:
        coef = jax.ShapeDtypeStruct((), jnp.float32, sharding=actor.step.sharding)
    if config.actor.ref_refresh_steps:
        reference = job.learner.abstract_reference()
    critic = job.critic and job.critic.abstract_state()
    return ppo.TrainState(actor, critic, coef, reference)


def assign_credit(
    job: Job, records: Records, state: ppo.TrainState, groups: Groups, step: int
) -> tuple[ppo.TrainState, TrainBatch, dict[str, float]]:
    """The training batch of a step with its advantages, and metrics of them.

    The state is the same but for the weight of the KL penalty, if that is adaptive.
    """
    config, learner, scores = job.config, job.learner, groups.scores
    algorithm, params = config.algorithm, state.actor.params
    unknown = np.zeros_like(scores.total)
    rows = learner.make_rows(groups.asked, groups.rollouts, unknown)
    values = squares = None
    if learner.asks_other_policies:
        with records.phase("old_log_prob"):
            rows = learner.with_logprobs(params, rows, state.reference)
    if "sum_pi_squared" in plugins.estimator_of(algorithm).needs:
        with records.phase("old_log_prob"):
            squares = learner.policy.sum_pi_squared(params, rows)
    if job.critic:
        with records.phase("values"):
            values = job.critic.judge(state.critic.params, rows)
    with records.phase("adv"):
        judged = estimate.Judged(
            rewards=scores.total,
            by_function=np.nan_to_num(np.stack([*scores.by_function.values()])),
            weights=np.array(job.weights, np.float32),
            baselines=groups.baselines,
            values=values,
            sum_pi_squared=squares,
            kl_coef=jax.device_get(state.kl_coef),
        )
        rows, found = jax.device_get(
            estimate.advantages_of(rows, judged, algorithm=algorithm)
        )
        means = per_response(rows, scores.total.shape)
        records.rollouts(step, groups.asked, groups.rollouts, scores, means)
        if algorithm.pf_ppo:
            rows = draw_again(job, rows, scores.total, step)
    if state.kl_coef is not None:
        coef = kl.next_coef(
            algorithm.kl_ctrl.type,
            jnp.asarray(jax.device_get(state.kl_coef)),
            float(found["actor/reward_kl_penalty"]),
            scores.total.size,
            target_kl=algorithm.kl_ctrl.target_kl,
            horizon=algorithm.kl_ctrl.horizon,
        )
        coef = processes.place(coef, state.kl_coef.sharding)
        state = dataclasses.replace(state, kl_coef=coef)
    credited = {name: float(value) for name, value in found.items()}
    if algorithm.filter_groups:
        credited["training/groups_generated"] = float(groups.num_generated)
    return state, rows, credited


def draw_again(
    job: Job, rows: TrainBatch, rewards: Float[np.ndarray, "P G"], step: int
) -> TrainBatch:
    """As many responses as before, drawn with PF-PPO's weights."""
    how = job.config.algorithm.pf_ppo
    weights = advantages.pf_ppo_weights(
        jnp.asarray(rewards.ravel()), how.reweight_method, weight_pow=how.weight_pow
    )
    key = jax.random.key(seed(job.config, RESAMPLE, step))
    return job.learner.take(rows, advantages.resample(key, weights).tolist())


def update(
    job: Job, records: Records, state: ppo.TrainState, rows: TrainBatch, step: int
) -> tuple[ppo.TrainState, dict[str, float]]:
    """Everything that learns, learns: the critic, then, once that has warmed up, the
    policy."""
    config, order, learned = job.config, seed(job.config, ORDER, step), {}
    if job.critic:
        with records.phase("update_critic"):
            critic, learned = job.critic.update(state.critic, rows, order)
        state = dataclasses.replace(state, critic=critic)
    if step > config.trainer.critic_warmup:
        with records.phase("update_actor"):
            actor, of_actor = job.learner.update(state.actor, rows, order)
        state, learned = dataclasses.replace(state, actor=actor), learned | of_actor
    refresh = config.actor.ref_refresh_steps
    if refresh and step % refresh == 0:
        reference = job.learner.as_reference(state.actor.params)
        state = dataclasses.replace(state, reference=reference)
    return state, learned


def per_response(rows: TrainBatch, shape: tuple[int, int]) -> np.ndarray:
    """The mean advantage of the tokens of every response, float32 [P, G]."""
    ids = rows.sequence_ids[rows.response_mask]
    total = np.bincount(ids, rows.advantages[rows.response_mask], rows.num_sequences)
    count = np.maximum(np.bincount(ids, minlength=rows.num_sequences), 1)
    return (total / count).reshape(shape).astype(np.float32)


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come, so that the loop can end after its step.

    A second Ctrl-C interrupts at once. Outside the main thread (some notebooks) signals
    are left alone.
    """
    asked = threading.Event()

    def ask(number: int, _frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def validate(job: Job, records: Records, step: int) -> evaluate.Validation | None:
    """Answers the held-out questions with the weights the engine holds, if it is time
    for it."""
    if not records.validation_due(step):
        return None
    with records.phase("testing"):
        return _answer_held_out(job, step)


def _answer_held_out(job: Job, step: int) -> evaluate.Validation:
    return evaluate.validate(
        job.engine,
        job.data.val,
        job.score_held_out,
        config=job.config.val,
        rollout=job.config.rollout,
        seed=seed(job.config, VALIDATION, 0),
        step=step,
    )
