"""Reinforcement learning for language models in JAX.

    import jaxrl_llm
    result = jaxrl_llm.train("Qwen/Qwen2.5-0.5B-Instruct", rows, reward=f, steps=50)

`train`, `sft`, `reward_model`, `dpo`, `evaluate`, `generate` and `load_config` run
things; `losses`, `kl`,
`advantages`, `masked`, `logprobs`, `grpo`, `ppo` and `preference` are pure functions;
`sharding` is meshes and the movement of weights between them. Names are imported when
they are first used, so `import jaxrl_llm` loads nothing, JAX included.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_llm import sharding
    from jaxrl_llm.algorithms import (
        advantages,
        grpo,
        kl,
        logprobs,
        losses,
        masked,
        ppo,
        preference,
    )
    from jaxrl_llm.api import dpo, evaluate, generate, reward_model, sft, train
    from jaxrl_llm.config.parsing import load as load_config

    __version__: str

__all__ = [
    "advantages",
    "dpo",
    "evaluate",
    "generate",
    "grpo",
    "kl",
    "load_config",
    "logprobs",
    "losses",
    "masked",
    "ppo",
    "preference",
    "reward_model",
    "sft",
    "sharding",
    "train",
]

_MODULES = {
    name: f"jaxrl_llm.algorithms.{name}"
    for name in (
        *("advantages", "grpo", "kl", "logprobs", "losses", "masked", "ppo"),
        "preference",
    )
} | {"sharding": "jaxrl_llm.sharding"}
_FUNCTIONS = {
    "dpo": ("jaxrl_llm.api", "dpo"),
    "evaluate": ("jaxrl_llm.api", "evaluate"),
    "generate": ("jaxrl_llm.api", "generate"),
    "load_config": ("jaxrl_llm.config.parsing", "load"),
    "reward_model": ("jaxrl_llm.api", "reward_model"),
    "sft": ("jaxrl_llm.api", "sft"),
    "train": ("jaxrl_llm.api", "train"),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name in _MODULES:
        found = importlib.import_module(_MODULES[name])
    elif name in _FUNCTIONS:
        module, function = _FUNCTIONS[name]
        found = getattr(importlib.import_module(module), function)
    elif name == "__version__":
        try:
            found = metadata.version("jaxrl-llm")
        except metadata.PackageNotFoundError:
            found = "0+not.installed"  # a checkout on the path
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__, "__version__"})
