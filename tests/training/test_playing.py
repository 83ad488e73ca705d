"""What section `agent` makes of episodes, without a model."""

from fixed_rollouts import make_config

from jaxrl_llm.config import schema as configs
from jaxrl_llm.training import playing


def limits(**agent):
    config = make_config("unused").model_dump()
    agent = {"environment": "higher_lower"} | agent
    return playing.limits_of(configs.Config.model_validate(config | {"agent": agent}))


def test_no_more_environments_are_waited_for_than_there_are_workers():
    found = limits(reproducible=True, workers=3)
    assert found.together and found.at_once == 3
    assert limits(workers=3).at_once is None
