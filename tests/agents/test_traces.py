"""What SFT shows is what the policy will read, letter by letter."""

import pathlib
import random
import runpy

import pytest
import tiny

from jaxrl_llm.agents import hosting, tools
from jaxrl_llm.agents.hosting import Hosted, Settings
from jaxrl_llm.agents.template import Splicer
from jaxrl_llm.config import parsing
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.types import Prompt

ROOT = pathlib.Path(__file__).parents[2]
FORMAT = tools.FORMATS["bracket"]


@pytest.mark.parametrize("game", ["calculator", "higher_lower"])
def test_a_trace_reads_as_the_episode_does(game):
    play = runpy.run_path(str(ROOT / "examples/agents/traces.py"))[game]
    config = parsing.load(ROOT / f"configs/{game}_smollm2_cpu.yaml")
    trace = play(random.Random(3))
    encoder = Encoder(tokenizer=tiny.tokenizer())
    splicer = Splicer(encoder, FORMAT.describe)
    environment = hosting.find("agent.environment", config.agent.environment)
    hosted = Hosted(Settings(environment=environment), FORMAT)

    system = config.data.train.system_prompt
    content = [{"role": "system", "content": system}] if system else []
    prompt = Prompt(
        id=0,
        content=[*content, {"role": "user", "content": ""}],
        tokens=(1,),
        columns={"seed": random.Random(3).getrandbits(32)},
    )
    opening = hosted.open((0, 0), prompt, 0).result()
    tokens = [*splicer.begin(opening.messages, opening.tools)]
    said = [m["content"] for m in trace if m["role"] == "assistant"]
    for text in said:
        sampled = encoder.tokenizer(f"{text}<|im_end|>").input_ids
        tokens += sampled
        reply = hosted.answer((0, 0), text).result()
        assert (reply.ended is None) == (text is not said[-1])
        if reply.ended is None:
            tokens += splicer.splice(sampled, "stop", reply.messages)
    outcome = hosted.close((0, 0)).result()
    hosted.shutdown()
    read = encoder.tokenizer.decode(tokens)
    assert read == encoder.render(trace, end="closed").removesuffix("\n")
    if game == "calculator":
        assert outcome.reward == 1
