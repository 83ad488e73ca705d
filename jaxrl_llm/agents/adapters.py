"""Environments of other libraries, with `reset` and `step` as Gymnasium has them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm.agents.seat import taken

_PLAYER = 0


class TextArena:
    """A game of textarena for one player.

    Args:
      env_id: such as GuessTheNumber-v0-raw. Without -raw, what is observed begins with
        all that was said before, which the policy has read already.
      params: arguments of `textarena.make`.
    """

    def __init__(self, env_id: str, **params: Any):
        import textarena

        self._make = lambda: textarena.make(env_id, **params)

    def reset(self, seed: int) -> str:
        """The rules, and what is to be seen first."""
        self._game = self._make()
        self._game.reset(num_players=1, seed=seed)
        return self._seen()

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """The reward is the game's, at its end."""
        done, info = self._game.step(action=text)
        if not done:
            return self._seen(), 0.0, False, False, info
        rewards, _ = self._game.close()
        return "", float(rewards[0]), True, False, info

    def _seen(self) -> str:
        _, observation = self._game.get_observation()
        if isinstance(observation, str):
            return observation
        # (speaker, text, kind): the policy's own words, it knows.
        return "\n".join(text for who, text, _ in observation if who != _PLAYER)


class Gem:
    """An environment of GEM.

    Args:
      env_id: such as game:GuessTheNumber-v0-easy.
      params: arguments of `gem.make`.
    """

    def __init__(self, env_id: str, **params: Any):
        import gem

        self._env = gem.make(env_id, **params)

    def reset(self, seed: int) -> Any:
        """The rules and the first observation, with more for people to read."""
        return self._env.reset(seed=seed)

    def step(self, text: str) -> Any:
        """Observation, reward, and whether the episode is over."""
        return self._env.step(text)


class SkyRL:
    """A `BaseTextEnv` of skyrl-gym; a new one for every episode, which is given its row
    as `extras`.

    Args:
      make: the class.
      params: what it calls `env_config`.
    """

    def __init__(self, make: Callable[..., Any], **params: Any):
        self._make, self._params = make, params

    def reset(
        self, prompt: Sequence[Mapping[str, Any]], **columns: Any
    ) -> list[Mapping[str, Any]]:
        """The whole conversation."""
        given = {"env_config": self._params, "extras": columns}
        self._env = self._make(**taken(self._make, given))
        messages, _ = self._env.init(list(prompt))
        return list(messages)

    def step(self, text: str) -> Any:
        """The observations, the reward, and whether the episode is over."""
        result = self._env.step(text)
        if result["done"]:
            self._env.close()
        return result
