"""(prompt, response, answer) -> number."""

from jaxrl_llm.rewards.builtin import resolve
from jaxrl_llm.rewards.scoring import RewardError, RewardFunction, Scores, score

__all__ = ["RewardError", "RewardFunction", "Scores", "resolve", "score"]
