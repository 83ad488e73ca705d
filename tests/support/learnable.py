"""Sums to answer, and the configuration of a run that learns in a few steps."""

import json
import pathlib

STEPS, PROMPTS, SAMPLES = 8, 4, 8
QUESTIONS = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(13)]


def values(model: str, rows: pathlib.Path) -> dict:
    """A configuration, but for its output_dir; writes the questions to folder `rows`.

    Imported by name: "tiny:small_ids", so tests/support must be on the path.
    """
    for name, part in (("train", QUESTIONS[:10]), ("val", QUESTIONS[10:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (rows / f"{name}.jsonl").write_text("".join(lines))
    return {
        "model": {"path": model},
        "data": {
            "train": {"path": str(rows / "train.jsonl")},
            "val": {"path": str(rows / "val.jsonl")},
            "train_batch_size": PROMPTS,
            "max_prompt_length": 48,
        },
        "rollout": {
            "n": SAMPLES,
            "max_response_length": 8,
            "decode_chunk": 8,
            "dtype": "float32",
        },
        "actor": {
            "dtype": "float32",
            "remat": "none",
            "optim": {"lr": 0.02, "weight_decay": 0.0},
        },
        # Only a test that stops it at the gate makes it take long.
        "reward": {"functions": [{"name": "tiny:small_ids"}], "timeout_s": 900.0},
        "val": {"n": 2, "threshold": 0.7},
        "trainer": {"total_training_steps": STEPS, "save_freq": 2, "test_freq": 4},
    }
