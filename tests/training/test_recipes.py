"""Every configuration for one machine, as it is but for its size, trains."""

import json

import pytest
import recipes

from jaxrl_llm.config import parsing
from jaxrl_llm.training.build import build
from jaxrl_llm.training.loop import run

pytestmark = pytest.mark.slow

SMALL = {
    "rollout.max_response_length": "8",
    "rollout.decode_chunk": "8",
    "rollout.max_num_seqs": "8",
    "actor.micro_batch_size": "8",
    "reward.functions": "[{name: 'tiny:small_ids'}]",
    "val.n": "1",
    "trainer.total_training_steps": "2",
    "trainer.test_freq": "2",
    "trainer.save_freq": "2",
}
ALONE = {"data.train_batch_size": "8", "rollout.n": "1"}
GROUPS = {"data.train_batch_size": "4", "rollout.n": "4"}
SUMS = {"data.max_prompt_length": "112", "data.val.size": "4"}
PLAYED = {
    "data.max_prompt_length": "300",
    "agent.max_tokens": "200",
    "actor.pack_length": "512",
}
"""The words of a game are more tokens to a tokenizer of bytes."""
FITTING = {
    "calculator_smollm2_cpu": PLAYED,
    "calculator_qwen2.5_coder_1.5b_1gpu": PLAYED | {"actor.optim.lr_warmup_steps": "1"},
    "higher_lower_smollm2_cpu": PLAYED,
    "higher_lower_qwen2.5_coder_1.5b_1gpu": PLAYED
    | {"actor.optim.lr_warmup_steps": "1"},
    "dapo_smollm2_cpu": {"algorithm.filter_groups.metric": "small_ids"},
    "ppo_smollm2_cpu": {"trainer.critic_warmup": "1"},
    "reinforce_pp_smollm2_cpu": {"actor.ppo_mini_batch_size": "4"},
}


def local(folder):
    """The options that read questions as GSM8K has them from a file in `folder`."""
    rows = [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    options = {"data.max_prompt_length": "300", "actor.optim.lr_warmup_steps": "1"}
    for name, part in (("train", rows[:8]), ("val", rows[8:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        options |= {f"data.{name}.path": str(path), f"data.{name}.params": "{}"}
    return options | {"data.val.split": "train"}


@pytest.mark.parametrize("name", recipes.TRAINED)
def test_a_recipe_trains(name, tiny_model, tmp_path):
    path = recipes.FILES[name]
    grouped = parsing.load(path).rollout.n > 1
    changes = {
        "output_dir": str(tmp_path / "run"),
        "model.path": tiny_model,
        **SMALL,
        **(GROUPS if grouped else ALONE),
        **(local(tmp_path) if name.startswith("gsm8k") else SUMS),
        **FITTING.get(name, {}),
    }
    if parsing.load(path).distillation:
        changes["distillation.teacher.path"] = tiny_model
    config = parsing.load(path, [f"--{key}={value}" for key, value in changes.items()])
    assert not run(build(config)).stopped
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    assert set(rows) == {0, 1, 2}
    assert rows[2]["actor/grad_norm"] > 0 and "val-core/all/acc/mean@1" in rows[2]
    assert (tmp_path / "run/huggingface/model.safetensors").is_file()
