import pytest

from jaxrl_llm.config.parsing import parse
from jaxrl_llm.config.secrets import without_secrets

VALUES = {
    "output_dir": "x",
    "model": {"path": "m"},
    "data": {"train": {"path": "hub:x", "params": {"token": "hf_1", "name": "main"}}},
    "rollout": {
        "engine": "vllm",
        "stop_token_ids": [3],
        "vllm": {
            "env": {"HF_TOKEN": "hf_2", "VLLM_API_KEY": "k", "NCCL_DEBUG": "INFO"}
        },
    },
    "reward": {"functions": [{"name": "exact"}]},
    "trainer": {"total_training_steps": 1},
}


def test_secrets_are_left_out_and_nothing_else():
    before = parse(VALUES, "test").model_dump(mode="json")
    after = without_secrets(before)
    assert after["data"]["train"]["params"] == {"name": "main"}
    assert after["rollout"]["vllm"]["env"] == {"NCCL_DEBUG": "INFO"}
    del before["data"]["train"]["params"]["token"]
    del before["rollout"]["vllm"]["env"]["HF_TOKEN"]
    del before["rollout"]["vllm"]["env"]["VLLM_API_KEY"]
    assert after == before


@pytest.mark.parametrize(
    "name", ["token", "WANDB_API_KEY", "password", "aws-secret-access-key", "Bearer"]
)
def test_names_of_secrets(name):
    assert without_secrets({name: "x"}) == {}


@pytest.mark.parametrize("name", ["tokenizer", "key", "prompt_key", "tokens", "path"])
def test_names_of_other_things(name):
    assert without_secrets({name: "x"}) == {name: "x"}
