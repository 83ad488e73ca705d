"""Two computers with the same kind of card, neither of which has compiled before."""

import json
import os
import subprocess
import sys

import pytest
import tiny

from jaxrl_llm.tracking import run_directory

# Large enough that a GPU knows several ways to multiply.
SIZES = dict(
    hidden_size=896,
    intermediate_size=4864,
    num_layers=8,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    rope_of_layer=(0,) * 8,
    window_of_layer=(None,) * 8,
)


def numbers(folder) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))}
        for line in run_directory.read(folder)
    ]


@pytest.mark.accelerator
def test_a_cold_cache_gives_the_same_numbers(tmp_path):
    model = tiny.checkpoint(tmp_path / "model", **SIZES)
    sums = [{"prompt": f"{a} + {a} =", "answer": str(2 * a)} for a in range(64)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in sums))
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model: {{path: {model}}}
data: {{train: {{path: {data}}}, train_batch_size: 32, max_prompt_length: 64}}
rollout: {{n: 8, max_response_length: 192, max_num_seqs: 256}}
actor:
  {{optim: {{lr: 1e-5}}, pack_length: 1024, micro_batch_size: 16, remat: dots,
    use_kl_loss: true, ppo_mini_batch_size: 32}}
reward: {{functions: [{{name: numeric}}]}}
trainer: {{total_training_steps: 3}}
""")

    def run(name: str):
        folder, cache = tmp_path / name, tmp_path / f"cache of {name}"
        command = [sys.executable, "-m", "jaxrl_llm", "train", str(config)]
        subprocess.run(
            [*command, "--output_dir", str(folder)],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
            check=True,
        )
        assert any(cache.iterdir())
        weights = (folder / "huggingface/model.safetensors").read_bytes()
        return numbers(folder), weights

    first, weights = run("first")
    again, weights_again = run("again")
    assert len(first) >= 3
    assert first == again
    assert weights == weights_again
