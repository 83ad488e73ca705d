"""What section `agent` makes of episodes, without a model."""

import pytest
import templates
from fixed_rollouts import make_config

from jaxrl_llm.config import schema as configs
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.training import playing


def playing_with(**agent):
    config = make_config("unused").model_dump()
    agent = {"environment": "higher_lower"} | agent
    return configs.Config.model_validate(config | {"agent": agent})


def limits(**agent):
    return playing.limits_of(playing_with(**agent))


def test_no_more_environments_are_waited_for_than_there_are_workers():
    found = limits(reproducible=True, workers=3)
    assert found.together and found.at_once == 3
    assert limits(workers=3).at_once is None


@pytest.mark.parametrize(
    "template, turns, said",
    [(templates.THINKING, 2, 1), (templates.THINKING, 1, 0), (templates.HEADERS, 2, 0)],
)
def test_a_run_says_where_the_template_would_rewrite_turns(template, turns, said):
    encoder = Encoder(tokenizer=templates.tokenizer(template))
    agent = playing.agent_of(playing_with(max_turns=turns), encoder, seen=False)
    agent.close()
    assert len(agent.notes) == said and not agent.limits.forks
    forks = playing_with(max_turns=turns, on_rewrite="fork", max_tokens=99)
    agent = playing.agent_of(forks, encoder, seen=False)
    agent.close()
    assert not agent.notes and agent.limits.forks
    assert all("leaves out of earlier turns" in note for note in agent.notes)
