"""(prompt, response, answer) -> number."""

from jaxrl_llm.rewards.builtin import Term, resolve
from jaxrl_llm.rewards.scoring import RewardError, RewardFunction, score

__all__ = ["RewardError", "RewardFunction", "Term", "resolve", "score"]
