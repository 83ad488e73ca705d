"""Games as a scripted player plays them, as conversations to show a model (SFT).

python examples/agents/traces.py calculator runs/calculator/traces
python examples/agents/traces.py higher_lower runs/higher_lower/traces
"""

import json
import pathlib
import random
import re
import sys

from jaxrl_llm.agents import tools
from jaxrl_llm.agents.games.calculator import Calculator
from jaxrl_llm.agents.games.higher_lower import HigherLower


def calculator(draw):
    """Asks the tool, and repeats what it says."""
    game = Calculator()
    question = game.reset(seed=draw.getrandbits(32))
    product = re.search(r"\d+ \* \d+", question)[0]
    result = game.calculate(product)
    shown = [tools.schema(game.calculate)]
    return [
        {"role": "system", "content": tools.FORMATS["bracket"].describe(shown)},
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"[calculate({product})]"},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": result},
    ]


def higher_lower(draw):
    """Guesses anything that the answers allow, which wins 68 %: what to guess to win
    all is left to be found."""
    game, low, high = HigherLower(), 1, 7
    words = game.reset(seed=draw.getrandbits(32))
    messages = [{"role": "system", "content": "Play."}]
    over = False
    while not over:
        guess = draw.randint(low, high)
        messages += [
            {"role": "user", "content": words},
            {"role": "assistant", "content": str(guess)},
        ]
        words, _, over, _, _ = game.step(str(guess))
        low, high = (guess + 1, high) if words == "Higher." else (low, guess - 1)
    return messages


if __name__ == "__main__":
    play = {"calculator": calculator, "higher_lower": higher_lower}[sys.argv[1]]
    folder, draw = pathlib.Path(sys.argv[2]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"messages": play(draw)}) for _ in range(600)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    print(f"{folder / 'train.jsonl'}: {len(rows)} games")
