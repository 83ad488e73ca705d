"""(prompt, response, answer) -> number."""

from jaxrl_llm.rewards.builtin import Term, resolve
from jaxrl_llm.rewards.function import RewardError, RewardFunction
from jaxrl_llm.rewards.isolation import Isolation
from jaxrl_llm.rewards.scoring import score

__all__ = ["Isolation", "RewardError", "RewardFunction", "Term", "resolve", "score"]
