"""The configurations in configs/, and the test that each is checked by."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted(ROOT.glob("configs/*.yaml"))}
SERVED = [name for name in FILES if "vllm" in name]
PLANNED = [name for name in FILES if re.search(r"_v\d[ep]\d+$", name)]
TRAINED = [name for name in FILES if name not in {*SERVED, *PLANNED}]


def test_of(name: str) -> str:
    """The pytest node that checks a configuration by more than reading it."""
    if name in TRAINED:
        return f"tests/training/test_recipes.py::test_a_recipe_trains[{name}]"
    if name in PLANNED:
        return f"tests/planning/test_tpu.py::test_a_recipe_is_planned[{name}]"
    if name == "quickstart_smollm2_vllm_cpu":
        return (
            "tests/rollout/test_vllm.py::test_five_steps_learn_as_with_the_jax_engine"
        )
    valid = "tests/config/test_config.py::test_every_shipped_configuration_is_valid"
    return f"{valid}[{name}.yaml]"


def plan_of(name: str) -> tuple[str, str]:
    """Topology and model of the command `jaxrl plan` in the file's head."""
    [found] = re.findall(
        r"^#   jaxrl plan configs/(\S+)\.yaml --topology (\S+) --model\.path (\S+)$",
        FILES[name].read_text(),
        re.MULTILINE,
    )
    assert found[0] == name
    return found[1:]
