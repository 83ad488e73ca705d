"""One loop, joined by different schedules."""

import json

import tiny
from short_run import GRPO, make_config, mean_id

from jaxrl_llm.data.stream import PromptBatches
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.tracking.result import Result
from jaxrl_llm.training import loop
from jaxrl_llm.training.build import build

STEPS = 3


class OneBehind:
    """An exact lag of one step, in one thread: what step s learns from is generated
    while s - 1 is still to be learned from."""

    def __init__(self, collect, load):
        self.collect, self.load, self.ready = collect, load, {}

    def publish(self, params, step):
        sent = self.load(params, step)
        ahead = [step + 2] if self.ready else [step + 1, step + 2]
        self.ready |= {s: self.collect(s) for s in ahead if s <= STEPS}
        return sent

    def experience(self, step):
        return self.ready.pop(step)


def test_another_schedule_is_the_same_loop_with_older_weights(tmp_path):
    weights = tiny.checkpoint(tmp_path / "tiny")
    changed = GRPO | {"trainer.save_freq": 1, "trainer.max_ckpt_to_keep": STEPS}
    config = make_config(weights, tmp_path, **changed)
    job = build(config, [RewardFunction(name="given", function=mean_id)])
    directory = loop.run(job, OneBehind).directory

    steps = [Result(directory).completions(s + 1) for s in range(STEPS)]
    versions = [{record["weight_version"] for record in step} for step in steps]
    assert versions == [{0}, {0}, {1}]
    # The prompts are those of any schedule, and a checkpoint is of what was learned
    # from, however far ahead was generated.
    data = config.data.train_batch_size, config.seed, config.data.shuffle
    stream = PromptBatches(job.data.train, *data)
    for step, batch in zip(steps, stream, strict=False):
        assert {r["prompt_id"] for r in step} == {prompt.id for prompt in batch}
    positions = [
        json.loads((directory / f"checkpoints/{s + 1}/position/metadata").read_text())
        for s in range(STEPS)
    ]
    assert [position["prompts"]["batches"] for position in positions] == [1, 2, 3]
