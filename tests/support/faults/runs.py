"""The run that faults strike, and whether what it left behind is what it should be."""

import json
import pathlib
import shutil

import yaml

STEPS = 8
SAVED_EVERY = 2
MAY_DIFFER = ("timing_s/", "perf/")
"""Metrics of time, speed and memory."""


def write_inputs(folder: pathlib.Path, model: pathlib.Path) -> dict:
    """The training data in `folder`. Returns the configuration but for output_dir."""
    questions = [
        {"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(9)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    return {
        "model": {"path": str(model)},
        "data": {
            "train": {"path": str(path)},
            "train_batch_size": 2,
            "max_prompt_length": 48,
        },
        "rollout": {
            "n": 2,
            "max_response_length": 4,
            "decode_chunk": 4,
            "dtype": "float32",
        },
        "actor": {"dtype": "float32", "remat": "none", "optim": {"lr": 0.02}},
        # Only a test that stops it at the gate makes it take long.
        "reward": {"functions": [{"name": "faults.rewards:small_ids"}]},
        "trainer": {
            "total_training_steps": STEPS,
            "save_freq": SAVED_EVERY,
            "num_examples": 0,
        },
    }


def write_config(
    folder: pathlib.Path, values: dict, run: pathlib.Path, **changed
) -> str:
    """The configuration with `changed`, by dotted keys, in a file."""
    text = json.dumps({"output_dir": str(run), **values})
    made = json.loads(text)
    for key, value in changed.items():
        *sections, name = key.split(".")
        section = made
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return str(path)


def wrong(run: pathlib.Path, right: pathlib.Path, last: int = STEPS) -> str | None:
    """What the run has other than the unbroken one, and which kind of fault that is:
    "lost: ..." for steps and rows missing or doubled, "silent: ..." for other content.
    None if all is equal.
    """
    try:
        lines, wanted = metrics(run), metrics(right)[: last + 1]
    except (ValueError, OSError) as error:
        return f"lost: metrics.jsonl: {error}"
    steps, all_steps = [l["step"] for l in lines], [l["step"] for l in wanted]
    if steps != all_steps:
        return f"lost: metrics of steps {steps}, not {all_steps}"
    for line, good in zip(lines, wanted, strict=True):
        if different := [
            k for k in good.keys() | line.keys() if good.get(k) != line.get(k)
        ]:
            return f"silent: step {good['step']}: {sorted(different)[:4]}"
    ours, theirs = rollouts(run), rollouts(right)
    if ours.keys() != theirs.keys():
        return f"lost: rollouts {sorted(ours.keys() ^ theirs.keys())}"
    for name, text in theirs.items():
        if ours[name] != text:
            count = len(ours[name].splitlines()), len(text.splitlines())
            kind = "lost" if count[0] != count[1] else "silent"
            return f"{kind}: {name} has {count[0]} rows, of {count[1]}"
    ours, theirs = weights(run), weights(right)
    if ours != theirs:
        names = [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
        kind = "lost" if any(n not in ours for n in names) else "silent"
        return f"{kind}: weights {sorted(names)}"
    return None


def metrics(run: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {k: v for k, v in line.items() if not k.startswith(MAY_DIFFER)}
        for line in lines
    ]


def rollouts(run: pathlib.Path) -> dict[str, str]:
    """The text of each rollout file, by name."""
    return {path.name: path.read_text() for path in (run / "rollouts").iterdir()}


def weights(run: pathlib.Path) -> dict[str, bytes]:
    """The bytes of each file of the exported model that says what it computes."""
    return model_files(run / "huggingface")


def model_files(folder: pathlib.Path) -> dict[str, bytes]:
    """The bytes of each file of a model that says what it computes, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("*"))
        if path.suffix in (".safetensors", ".json", ".jinja")
    }


def copy(run: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """A copy in place of what was there."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, symlinks=True)
    return to
