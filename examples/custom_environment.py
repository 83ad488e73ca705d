"""An environment of one's own: python examples/custom_environment.py MODEL OUT"""

import sys

import jaxrl_llm


class Echo:
    """Asks for a word twice, and rewards each turn that says it."""

    def reset(self, seed):
        """The first words."""
        self.word, self.turn = ["tea", "sun", "map"][seed % 3], 0
        return f"Say {self.word}."

    def step(self, text):
        """Observation, reward, terminated, truncated, info."""
        self.turn, right = self.turn + 1, float(self.word in text)
        return f"Again: {self.word}.", right, self.turn == 2, False, {}


size = {"data.train_batch_size": 4, "rollout.n": 4, "rollout.max_response_length": 8}
how = {"steps": 2, "settings": size, "output_dir": sys.argv[2]}
jaxrl_llm.train(sys.argv[1], 16, [], environment=Echo, **how)
