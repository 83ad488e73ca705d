"""(prompt, response, answer) -> number."""

from jaxrl_llm.rewards.builtin import Term, resolve
from jaxrl_llm.rewards.scoring import RewardError, RewardFunction, Scores, score

__all__ = ["RewardError", "RewardFunction", "Scores", "Term", "resolve", "score"]
