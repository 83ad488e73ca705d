"""Four prompts with two episodes each, their advantages, and a run's configuration."""

import functools

import numpy as np
from observations import insert

from jaxrl_llm.config import schema as configs
from jaxrl_llm.data.types import Completion, Prompt, single_turn

ONE, EIGHT = (1, 1, 1), (2, 2, 2)  # data, fsdp, tensor
P, G = 4, 2
ADVANTAGES = np.array([[1, -1], [0.5, -0.5], [-2, 2], [0.3, -0.3]], np.float32)


def make_config(path, **actor):
    # With a large eps AdamW is nearly SGD: it does not blow rounding errors of a
    # vanishing gradient up to a whole step.
    optim = {"lr": 0.05, "eps": 0.01, "weight_decay": 0.1}
    return configs.Config.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": path},
            "data": {
                "train": {"path": "unused"},
                "train_batch_size": P,
                "max_prompt_length": 8,
            },
            "rollout": {"n": G, "temperature": 0.8, "max_response_length": 8},
            "actor": {"dtype": "float32", "remat": "none", "optim": optim} | actor,
            "reward": {"functions": [{"name": "exact"}]},
            "trainer": {"total_training_steps": 10},
        }
    )


# What tools say before which sampled tokens: nothing, at the start, within, repeatedly.
# No episode gets longer than 16 tokens.
OBSERVED = {
    (0, 0): {0: [7, 8], 3: [9]},
    (1, 0): {2: [11, 12], 6: [13]},
    (1, 1): {0: [14]},
    (2, 0): {0: [15, 16]},
    (2, 1): {0: [17], 1: [18], 2: [19]},
    (3, 1): {2: [20, 21, 22]},
}


def make_rollouts():
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.integers, 0, 256)
    prompts = [
        Prompt(id=p, content="", tokens=tuple(draw(n).tolist()), columns={})
        for p, n in enumerate([3, 6, 2, 4])
    ]
    lengths = [[5, 2], [7, 3], [1, 8], [4, 4]]
    completions = [
        [
            Completion(
                prompt_id=p,
                sample=g,
                tokens=draw(n).astype(np.int32),
                logprobs=rng.uniform(-6, -5, n).astype(np.float32),
                raw_logprobs=np.zeros(n, np.float32),
                finish_reason="stop",
                weight_version=0,
                text="",
            )
            for g, n in enumerate(group)
        ]
        for p, group in enumerate(lengths)
    ]
    return prompts, [
        [insert(e, OBSERVED.get((p, g), {})) for g, e in enumerate(group)]
        for p, group in enumerate(single_turn(completions))
    ]
