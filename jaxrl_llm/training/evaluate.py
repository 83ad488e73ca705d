"""How good the policy is on held-out questions, and how sure of it one can be.

Q questions, n sampled answers each. The question is the unit: answers to the same
question are not independent, so intervals are about other questions like these.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from jaxrl_llm.config.schema import (
    EngineConfig,
    LoopConfig,
    SamplingConfig,
    ValConfig,
)
from jaxrl_llm.data.types import Episode, Prompt
from jaxrl_llm.rollout.engine import Engine, Request, Sampling
from jaxrl_llm.tracking import step_metrics
from jaxrl_llm.tracking.step_metrics import Validation
from jaxrl_llm.training.build import Job
from jaxrl_llm.training.experience import Observe, Score
from jaxrl_llm.training.playing import Agent, episodes_of, mask_unjudged
from jaxrl_llm.training.randomness import Purpose, seed


def validate(
    engine: Engine,
    prompts: Sequence[Prompt],
    score: Score,
    *,
    config: ValConfig,
    rollout: EngineConfig,
    seed: int,
    step: int,
    agent: Agent | None = None,
) -> Validation:
    """Answers every question n times sampled and, if asked to, once greedily. All
    processes call it.

    The same seed draws the same random numbers each time, so that two validations of
    one run differ only by their weights.

    Metrics, for each value `src` of the column `data_source` ("all" if there is none):

        val-core/src/reward/mean@n       mean reward of the sampled answers
        val-core/src/acc/mean@n          share of them that are correct
        val-core/src/acc/best@k/mean     pass@k, for k = 2, 4, 8, ... up to n
        val-core/src/acc/greedy          share of greedy answers that are correct
        .../ci95_low, .../ci95_high      95 % interval of the two shares
        val-aux/src/NAME/mean@n          mean score of one reward function, where it
                                         judges
        val-aux/response_length/mean     tokens, sampled answers
        val-aux/response_length/clip_ratio
        val-aux/agent/...                as in training; masked tells the share of
                                         questions that are left out of all others, as
                                         an environment failed

    veRL estimates best@k by drawing k of the n answers with replacement, which is too
    low; this is the unbiased estimator.

    Args:
      rollout: says where a response ends; how it is drawn stands in `config`.
      step: goes into the records.
      agent: what the policy plays against; it answers if not given.

    Raises:
      ValueError: there are no questions, or two share an id.
    """
    if not prompts:
        raise ValueError("there are no held-out questions to validate on")

    def answer(sampling: SamplingConfig, n: int, kind: str):
        limits = Sampling(
            max_tokens=rollout.max_response_length,
            stop=rollout.stop,
            stop_token_ids=rollout.stop_token_ids,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        requests = [
            Request(
                prompt_id=prompt.id,
                tokens=prompt.tokens,
                num_samples=n,
                seed=seed,
                sampling=limits,
            )
            for prompt in prompts
        ]
        episodes = episodes_of(engine, agent, prompts, requests)
        scores = score(prompts, episodes)
        episodes = mask_unjudged(episodes, scores)
        correct = scores.total >= config.threshold
        records = step_metrics.rollout_records(
            step,
            "val",
            kind,
            prompts,
            episodes,
            scores,
            data_source=np.array([[source_of(prompt)] * n for prompt in prompts]),
            correct=correct,
        )
        return episodes, scores, correct, records

    episodes, scores, correct, records = answer(config, config.n, "sampled")
    groups = _groups(prompts, episodes)
    metrics: dict[str, float] = {}
    for source, rows in groups.items():
        core, aux = f"val-core/{source}", f"val-aux/{source}"
        metrics[f"{core}/reward/mean@{config.n}"] = mean_at_k(scores.total[rows])
        metrics |= _share(f"{core}/acc/mean@{config.n}", correct[rows])
        for k in _powers_of_two(config.n):
            metrics[f"{core}/acc/best@{k}/mean"] = pass_at_k(correct[rows], k)
        for name, value in (scores.by_function | scores.details).items():
            if not np.isnan(value[rows]).all():
                judged = float(np.nanmean(value[rows]))
                metrics[f"{aux}/{name}/mean@{config.n}"] = judged
    flat = [episode for group in episodes for episode in group]
    lengths = [episode.num_sampled for episode in flat]
    metrics["val-aux/response_length/mean"] = float(np.mean(lengths))
    metrics["val-aux/response_length/clip_ratio"] = step_metrics.cut_off(flat)
    if agent:
        for name, value in step_metrics.agent_metrics(flat).items():
            metrics[f"val-aux/agent/{name.removeprefix('agent/')}"] = value
    if config.greedy:
        greedy = SamplingConfig(temperature=0.0)
        episodes, _, correct, more = answer(greedy, 1, "greedy")
        records += more
        for source, rows in _groups(prompts, episodes).items():
            metrics |= _share(f"val-core/{source}/acc/greedy", correct[rows])
    return Validation(metrics=metrics, records=records)


def if_due(job: Job, step: int, observe: Observe) -> Validation | None:
    """Answers the held-out questions with the weights the engine holds, if it is time
    for it after this step."""
    if not job.data.val or not due(job.config.trainer, step):
        return None
    with observe("testing"):
        return answer_held_out(job, step)


def due(trainer: LoopConfig, step: int) -> bool:
    """Whether held-out questions are to be answered after this step; after the last one
    they always are."""
    if step == 0:
        return trainer.val_before_train
    last = step == trainer.total_training_steps
    return last or (trainer.test_freq > 0 and step % trainer.test_freq == 0)


def answer_held_out(job: Job, step: int) -> Validation:
    """Answers the run's held-out questions with the weights the engine holds."""
    return validate(
        job.engine,
        job.data.val,
        job.score_held_out,
        config=job.config.val,
        rollout=job.config.rollout,
        seed=seed(job.config.seed, Purpose.VALIDATION, 0),
        step=step,
        agent=job.agent,
    )


def accuracy(validation: Validation | None) -> float | None:
    """The accuracy that says which checkpoint is best; None if not measured."""
    name = step_metrics.accuracy_name(list(validation.metrics)) if validation else None
    return validation.metrics[name] if name else None


def mean_at_k(values: Float[np.ndarray, "Q n"]) -> float:
    """The mean over answers, then over questions."""
    return float(values.mean(axis=1).mean())


def pass_at_k(correct: Bool[np.ndarray, "Q n"], k: int) -> float:
    """The chance that at least one of k answers is correct, mean over questions.

        1 - C(n - c, k) / C(n, k)        c of n answers correct

    Unbiased: the mean over all choices of k of the n answers.

    Raises:
      ValueError: k is not in 1 .. n, or there are no questions.

    Source: Chen et al. 2021, equation 1 (arXiv:2107.03374).
    """
    questions, n = correct.shape
    if not 1 <= k <= n or not questions:
        raise ValueError(
            f"pass@k needs at least one question and k in 1 .. n, got {questions} "
            f"questions, k={k}, n={n}"
        )
    wrong = (~correct).sum(axis=1).tolist()
    return 1 - sum(math.comb(w, k) for w in wrong) / math.comb(n, k) / questions


def confidence_interval(correct: Bool[np.ndarray, "Q n"]) -> tuple[float, float]:
    """95 % interval for the share of correct answers, over questions like these.

    Wilson's interval with an effective number of answers m in place of Q * n:

        m = p (1 - p) / (variance of the question means / Q), within [Q, Q n]
        (p + z^2/2m +- z sqrt(p (1 - p)/m + z^2/4m^2)) / (1 + z^2/m)

    With n = 1 it is Wilson's interval. Answers that always agree within a question
    count once (m = Q), independent ones each (m = Q n). When everything is right, or
    everything wrong, nothing is known about that and m = Q; the width is then not 0.

    Raises:
      ValueError: there are no answers.

    Source: Wilson 1927; the effective number: Korn and Graubard 1998, "Confidence
    intervals for proportions with small expected number of positive counts estimated
    from survey data", with Wilson's interval as in Franco et al. 2019.
    """
    questions, n = correct.shape
    if not correct.size:
        raise ValueError(f"no answers: {questions} questions with {n} answers each")
    p = float(correct.mean())
    m = float(questions)
    if n > 1 and questions > 1 and 0 < p < 1:
        variance = correct.mean(axis=1).var(ddof=1) / questions
        most = m * n
        m = min(max(p * (1 - p) / variance, m), most) if variance > 0 else most
    z2 = 1.959963984540054**2
    middle = p + z2 / (2 * m)
    reach = math.sqrt(z2 * (p * (1 - p) / m + z2 / (4 * m * m)))
    low, high = (middle - reach) / (1 + z2 / m), (middle + reach) / (1 + z2 / m)
    return max(low, 0.0), min(high, 1.0)


def _share(name: str, correct: Bool[np.ndarray, "Q n"]) -> dict[str, float]:
    low, high = confidence_interval(correct)
    return {
        name: float(correct.mean()),
        f"{name}/ci95_low": low,
        f"{name}/ci95_high": high,
    }


def source_of(prompt: Prompt) -> str:
    """The data source a question is of; "all" if none is given."""
    return str(prompt.columns.get("data_source", "all"))


def _groups(
    prompts: Sequence[Prompt], episodes: Sequence[Sequence[Episode]]
) -> dict[str, list[int]]:
    """Which rows belong to each data source, without those that have a masked
    episode."""
    groups: dict[str, list[int]] = {}
    for row, (prompt, group) in enumerate(zip(prompts, episodes, strict=True)):
        if not any(episode.masked for episode in group):
            groups.setdefault(source_of(prompt), []).append(row)
    return groups


def _powers_of_two(n: int) -> list[int]:
    """2, 4, 8, ... up to n."""
    return [2**i for i in range(1, n.bit_length())]
