"""Four responses, and functions' scores of them."""

import numpy as np

from jaxrl_llm.data.types import Completion, Prompt, single_turn
from jaxrl_llm.rewards import RewardFunction, score

TEXTS = [["a", "bb"], ["ccc", ""]]


def make(contents=("q0", "q1"), columns=({"answer": "A"}, {"answer": "B"})):
    """Two prompts, two responses each: TEXTS."""
    prompts = [
        Prompt(id=i, content=content, tokens=(1,), columns=row)
        for i, (content, row) in enumerate(zip(contents, columns, strict=True))
    ]
    completions = [
        [
            Completion(
                prompt_id=i,
                sample=g,
                tokens=np.arange(len(text), dtype=np.int32),
                logprobs=np.zeros(len(text), np.float32),
                raw_logprobs=np.zeros(len(text), np.float32),
                finish_reason="stop",
                weight_version=0,
                text=text,
            )
            for g, text in enumerate(group)
        ]
        for i, group in enumerate(TEXTS)
    ]
    return prompts, single_turn(completions)


def run(*functions, data=None, timeout_s=300.0, on_error="raise", **options):
    terms = [
        f if isinstance(f, RewardFunction) else RewardFunction(name=f"f{i}", function=f)
        for i, f in enumerate(functions)
    ]
    data = data or make()
    return score(terms, *data, timeout_s=timeout_s, on_error=on_error, **options)
