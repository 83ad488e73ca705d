"""How good a model is by held-out rows and by its answers to held-out questions."""

from typing import Any

from jaxrl_llm.algorithms.update import TrainState
from jaxrl_llm.tracking.step_metrics import Validation
from jaxrl_llm.training import evaluate
from jaxrl_llm.training.experience import Observe
from jaxrl_llm.training.offline_build import OfflineJob
from jaxrl_llm.training.randomness import Purpose, seed

EVERY = "all"
"""What metrics call the source of held-out rows."""


def if_due(
    job: OfflineJob, state: TrainState, step: int, observe: Observe
) -> Validation | None:
    """What is measured after this step, if it is time for it and there is something.

    Metrics of held-out rows are those of the objective by the names
    `val-core/all/NAME`, such as `val-core/all/sft/loss`; those of answers are those of
    `evaluate.validate`.
    """
    if not (job.data.val or job.engine) or not evaluate.due(job.config.trainer, step):
        return None
    with observe("testing"):
        metrics: dict[str, float] = {}
        records: list[dict[str, Any]] = []
        if job.data.val:
            found = job.learner.measure(state.params, job.held_out_rows())
            metrics |= {f"val-core/{EVERY}/{name}": x for name, x in found.items()}
        if job.engine:
            metrics |= job.engine.load(job.learner.weights(state), step)
            answers = evaluate.validate(
                job.engine,
                job.questions,
                job.score,
                config=job.config.val,
                rollout=job.config.rollout,
                seed=seed(job.config.seed, Purpose.VALIDATION, 0),
                step=step,
            )
            metrics |= answers.metrics
            records = answers.records
    return Validation(metrics=metrics, records=records)
