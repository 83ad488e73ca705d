"""Pairs of a right and a wrong sum in TRL's preference format, for a reward model.

python examples/pipeline/pairs.py runs/pipeline_smollm2/pairs
"""

import json
import pathlib
import random
import sys

import reasoning_gym

SYSTEM = "Answer with just the number."
SUMS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
    "format_style": "simple",
}
HELD_OUT = 16
"""Sums of which no pair is in train.jsonl."""


def answers(draws):
    """The answer to each different question of so many that are drawn."""
    made = reasoning_gym.create_dataset("basic_arithmetic", size=draws, seed=1, **SUMS)
    return {entry["question"]: int(entry["answer"]) for entry in made}


def pairs(question, right, count, draw):
    """The right answer beside so many others."""
    wrong = [number for number in range(21) if number != right]
    for other in draw.sample(wrong, count):
        yield {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
            ],
            "chosen": [{"role": "assistant", "content": str(right)}],
            "rejected": [{"role": "assistant", "content": str(other)}],
        }


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    draw, known = random.Random(0), answers(2000)
    questions = draw.sample(sorted(known), len(known))
    parts = {"val": questions[:HELD_OUT], "train": questions[HELD_OUT:]}
    for name, some in parts.items():
        rows = [row for q in some for row in pairs(q, known[q], 8, draw)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
        print(f"{folder / name}.jsonl: {len(rows)} pairs of {len(some)} sums")
