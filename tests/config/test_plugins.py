"""Functions of a user's own: found, checked, told what is on offer, remembered."""

import ast
import functools
import inspect
import pathlib
import subprocess
import sys
import textwrap

import pytest

from jaxrl_llm.config import algorithm, checks, parsing, plugins
from jaxrl_llm.config.algorithm import ESTIMATORS, LOSSES, OPTIMIZERS
from jaxrl_llm.config.names import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
MINIMAL = {
    "output_dir": "runs/x",
    "model": {"path": "some/model"},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "exact"}]},
    "trainer": {"total_training_steps": 3},
}


def parse(*overrides):
    return parsing.parse(parsing.override(MINIMAL, overrides), "run.yaml")


def parameters(name):
    return inspect.signature(plugins.find("test", name)).parameters


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_takes_what_its_record_says(loss):
    taken = parameters(loss.function)
    # Only a dual clip may be left out by those who call the function by hand.
    assert set(taken) == {*loss.needs, *loss.parameters}
    assert set(loss.needs) <= {*algorithm.LOSS_ARRAYS, "chosen"}
    assert ("chosen" in taken) == loss.looks_ahead
    assert set(loss.parameters.values()) <= set(algorithm.LOSS_NUMBERS)
    assert set(loss.required) <= set(loss.parameters.values())
    known = {*loss.needs, *algorithm.LOSS_NUMBERS}
    for name, offered in (
        (loss.clipped, known),
        (loss.chosen, {*algorithm.LOOKING_AHEAD, *algorithm.LOSS_NUMBERS}),
    ):
        assert name is None or set(parameters(name)) <= offered


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_estimator_takes_what_its_record_says(estimator):
    taken = parameters(estimator.function)
    # What `algorithm.adv_params` may give, or only a caller by hand.
    own = {"eps", "correction"}
    assert set(taken) - own == {*estimator.needs, *estimator.parameters}
    assert all(taken[name].default is not inspect._empty for name in own & set(taken))
    assert set(estimator.needs) <= set(algorithm.ESTIMATOR_ARRAYS)
    assert set(estimator.parameters) <= set(algorithm.ESTIMATOR_NUMBERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_what_the_configuration_has(name):
    taken = parameters(OPTIMIZERS[name])
    assert set(algorithm.OPTIMIZER_NUMBERS) <= set(taken)


def test_no_code_tells_losses_or_estimators_apart_by_name():
    """What a run must know of them stands in their records."""
    names = LOSSES.keys() | ESTIMATORS.keys()

    def texts(node):
        found = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
        return names.intersection(x for x in found if isinstance(x, str))

    bad = []
    for path in ROOT.glob("jaxrl_llm/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            method = isinstance(node, ast.Call) and ast.unparse(node.func)
            asks = (ast.Compare, ast.MatchValue)
            if method and method.endswith((".startswith", ".endswith")):
                text = " ".join(map(ast.unparse, node.args))
                said = {n for n in names if "_" in n and n.split("_", 1)[1] in text}
            else:
                said = texts(node) if isinstance(node, asks) else set()
            bad += [f"{path.name}:{node.lineno} {name}" for name in said]
    assert not bad


def test_the_tables_load_no_jax():
    code = """
        import sys
        from jaxrl_llm.config import algorithm, plugins, schema
        plugins.loss("gspo"), plugins.estimator("gae")
        assert not {"jax", "numpy"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def pulled(logprobs, advantages, old_logprobs, *, clip_ratio_low, beta=0.5):
    return beta * (logprobs - old_logprobs) ** 2 - advantages * logprobs


def test_a_loss_of_ones_own_gets_a_record_from_its_signature():
    loss = plugins.loss(pulled, {"beta": 0.1})
    assert loss.name == f"{__name__}:pulled" and loss.params == {"beta": 0.1}
    assert loss.needs == ("logprobs", "old_logprobs", "advantages")
    assert loss.parameters == {"clip_ratio_low": "clip_ratio_low"}
    assert not loss.looks_ahead and loss.clipped is None


def test_an_estimator_of_ones_own_gets_a_record_from_its_signature():
    def estimator(token_rewards, values, mask, gamma):
        pass

    record = plugins.estimator(estimator)
    assert record.needs == ("token_rewards", "mask", "values")
    assert record.has_critic and record.discounts
    assert not (record.normalises or record.asks_greedily or record.group)


def test_a_function_is_called_with_what_it_asks_for():
    given = {"logprobs": 3.0, "advantages": 2.0, "old_logprobs": 1.0, "mask": None}
    given |= {"clip_ratio_low": 0.2}
    assert plugins.call(pulled, given) == 0.5 * 4 - 6
    assert plugins.call(pulled, given, {"beta": 1.0}) == 4 - 6
    bound = functools.partial(pulled, beta=2.0, clip_ratio_low=0.5)
    assert plugins.call(bound, given) == 2 * 4 - 6


FUNCTIONS = """
def logits(logprobs, logit): return logprobs
def typo(logprob): return logprob
def positional(logprobs, /): return logprobs
def own(logprobs, *, zeal): return zeal * logprobs
def rest(logprobs, **params): return logprobs
def estimate(rewards, values): return rewards, values
def sparse(rewards): return rewards
def optimizer(learning_rate): return None
number = 3
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The name of a module in the working directory."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_functions.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield "own_functions"
    sys.modules.pop("own_functions", None)


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["--actor.policy_loss.loss_mode=own_functions:logits"],
            "actor.policy_loss.loss_mode: own_functions:logits asks for 'logit'; it "
            "may ask for logprobs, old_logprobs, advantages, mask, sequence_ids, "
            "num_sequences; the numbers clip_ratio_low,",
        ),
        (
            ["--actor.policy_loss.loss_mode=own_functions:typo"],
            "asks for 'logprob', did you mean 'logprobs'?",
        ),
        (
            ["--actor.policy_loss.loss_mode=own_functions:positional"],
            "own_functions:positional takes logprobs by position, not by name",
        ),
        (
            ["--actor.policy_loss.loss_mode=own_functions:own"],
            "for anything else give a default or actor.policy_loss.params.zeal",
        ),
        (
            [
                "--actor.policy_loss.loss_mode=own_functions:own",
                "--actor.policy_loss.params={zeal: 1, zael: 2}",
            ],
            "actor.policy_loss.params: own_functions:own has no parameter 'zael', "
            "did you mean 'zeal'?",
        ),
        (
            ["--actor.policy_loss.params={zeal: 1}"],
            "actor.policy_loss.params: vanilla has no parameter 'zeal'",
        ),
        (
            ["--actor.policy_loss.loss_mode=own_functions:number"],
            "actor.policy_loss.loss_mode: own_functions has no function 'number'",
        ),
        (
            ["--actor.policy_loss.loss_mode=no_such_module:f"],
            "actor.policy_loss.loss_mode: 'no_such_module:f': No module named",
        ),
        (
            ["--algorithm.adv_estimator=own_functions:own"],
            "algorithm.adv_estimator: own_functions:own asks for 'zeal'; it may ask "
            "for rewards, lengths, baselines,",
        ),
        (
            ["--algorithm={adv_estimator: 'own_functions:sparse', gamma: 0.9}"],
            "algorithm.gamma is 0.9 but algorithm.adv_estimator=own_functions:sparse "
            "does not discount",
        ),
        (
            ["--algorithm.adv_estimator=own_functions:sparse", "--critic.ppo_epochs=2"],
            "critic: a critic needs algorithm.adv_estimator=gae, not own_functions:sp",
        ),
        (
            ["--actor.optim={name: 'own_functions:own'}"],
            "actor.optim.name: own_functions:own asks for 'logprobs'; it may ask for "
            "the numbers learning_rate,",
        ),
        (
            ["--actor.optim={name: 'own_functions:optimizer', weight_decay: 0.1}"],
            "actor.optim.weight_decay is 0.1, but own_functions:optimizer takes no",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_function_is_an_error_that_says_what_fits(module, overrides, said):
    config = parse(*overrides)
    with pytest.raises(ConfigError) as error:
        checks.check_functions(config)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "--actor.policy_loss={loss_mode: 'own_functions:own', params: {zeal: 2}}",
        "--actor.policy_loss={loss_mode: 'own_functions:rest', params: {any: 2}}",
        "--algorithm={adv_estimator: 'own_functions:estimate', lam: 1}",
        "--algorithm.adv_params={eps: 0.1}",
        "--actor.optim={name: 'optax:sgd', params: {momentum: 0.9}}",
    ],
)
def test_a_function_that_fits_passes(module, override):
    checks.check_functions(parse(override))


def test_a_name_that_nobody_knows_lists_the_choices():
    with pytest.raises(ConfigError, match="loss_mode is 'gsp', did you mean 'gspo'?"):
        parse("--actor.policy_loss.loss_mode=gsp")
    with pytest.raises(ConfigError, match="known: gae, grpo, .*, or module:function"):
        parse("--algorithm.adv_estimator=nothing")


def test_another_source_is_another_fingerprint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("logprobs", "logprobs", "-logprobs"):
        (tmp_path / "changing.py").write_text(f"def f(logprobs):\n    return {text}\n")
        sys.modules.pop("changing", None)
        config = parse("--actor.policy_loss.loss_mode=changing:f")
        found.append(checks.check_functions(config)["changing:f"])
    assert found[0] == found[1] != found[2]
    before = config.model_copy(update={"function_sources": {"changing:f": found[0]}})
    with pytest.raises(ConfigError, match=f"changing:f was {found[0]}, but is"):
        checks.check_functions(before)
    sys.modules.pop("changing", None)


def test_what_a_function_closes_over_counts():
    def scaled(by):
        return lambda logprobs: by * logprobs

    two, again, three = map(plugins.fingerprint, map(scaled, (2, 2, 3)))
    assert two == again != three
    one, other = (functools.partial(pulled, beta=b) for b in (0.1, 0.2))
    assert plugins.fingerprint(one) != plugins.fingerprint(other)
    code = {}
    exec("def f(x): return [x for _ in (1, 2)]\ndef g(x): return x", code)
    assert plugins.fingerprint(code["f"]) != plugins.fingerprint(code["g"])


def test_built_in_functions_have_no_fingerprint():
    assert checks.check_functions(parse()) == {}
