"""As many rows at a time as fit, found in few compilations and kept by the run."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest
import yaml
from compilations import told
from short_run import GRPO, make_config, mean_id

from jaxrl_llm.bench import train
from jaxrl_llm.data.packing import Layout
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.roles.actor import StepSize
from jaxrl_llm.roles.policy import PolicySettings
from jaxrl_llm.sharding import hardware, mesh
from jaxrl_llm.training import build, compiling, fitting, loop, roles

# 32 rows of 16 tokens on eight devices: 8, 16 or 32 at a time.
ROWS = GRPO | {"rollout.n": 4, "trainer.val_before_train": False}


def built(config):
    high = RewardFunction(name="high", function=mean_id, trusted=True)
    return build.build(config, [high])


def traced():
    """The names of the functions that JAX traces in the block."""
    return told("jaxpr_trace_duration")


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """A run on devices that do not count their memory."""
    return built(make_config(tiny_model, tmp_path_factory.mktemp("x") / "q", **ROWS))


@pytest.mark.parametrize(
    "now, multiple, wanted, free, fixed, size",
    [
        (16, 1, 39, 20, 0, 8),
        (16, 1, 39, 20, 4, 4),  # 4 + 35 / 2 are 21.5, 4 + 35 / 4 are 12.75
        (16, 8, 39, 20, 4, None),
        (16, 1, 39, 3, 4, None),
        (16, 2, 39, None, 4, 8),
        (16, 2, None, 20, 0, 8),
        (1, 1, 39, 20, 0, None),
    ],
)
def test_rows_are_halved_until_they_fit(now, multiple, wanted, free, fixed, size):
    free = free and math.ceil(free / 0.95)
    assert fitting.fewer(now, multiple, wanted, free, fixed) == size


@pytest.mark.parametrize(
    "factor, room, size, asked",
    [
        (1.0, 350, 32, [32]),  # 64 are not likely to fit, and are not asked for
        (1.0, 5000, 64, [64]),
        (1.3, 350, 16, [32, 16]),
        (0.5, 350, 64, [32, 64]),
        (4.0, 250, 4, [16, 4]),
        (9.0, 80, 1, [4, 1]),  # not even one fits
        (math.inf, 350, 1, [32, 16, 8, 4, 2, 1]),  # the compiler gives up
    ],
)
def test_the_largest_size_that_fits_is_found_in_few_tries(factor, room, size, asked):
    tried = []

    def needed(size):
        tried.append(size)
        return factor * (10 + 10 * size)

    sizes = [1, 2, 4, 8, 16, 32, 64]
    found = fitting.largest(sizes, lambda size: 10.0 + 10 * size, needed, room)
    assert found[0] == size and tried == asked
    assert found[1] == factor * (10 + 10 * size)


@pytest.mark.parametrize(
    "gathered, multiple, rows, length, sizes",
    [
        (True, 1, 64, 1024, [1, 2, 4, 8, 16, 32]),  # 32,768 tokens
        (False, 1, 64, 1024, [1, 2, 4, 8, 16]),  # 16,384
        (False, 1, 12, 1024, [1, 2, 4, 16]),  # in 16 rows of 8, four would be empty
        (True, 4, 64, 16_384, [4, 8]),
        (False, 4, 64, 16_384, [4]),
        (True, 4, 64, 65_536, [4]),
        (True, 6, 64, 1024, [6, 12, 24, 96]),  # 64 rows in 72 are still well used
    ],
)
def test_sizes_are_powers_of_two_for_each_device(
    plain, gathered, multiple, rows, length, sizes
):
    model = copy.copy(plain.actor.policy)
    axes = dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1)
    model.mesh = mesh.make(axes | {"fsdp" if gathered else "data": 8})
    model.layout = dataclasses.replace(model.layout, rows_multiple=multiple)
    assert fitting.sizes_for(model, rows, length) == sizes


@pytest.mark.parametrize(
    "model, rows, length, remat, mu_dtype, gib",
    [
        ("qwen2.5-1.5b", 16, 1024, "dots", "float32", 51),
        ("qwen3-4b", 8, 1024, "dots", "float32", 95),
        ("qwen3-8b", 8, 1024, "full", "bfloat16", 111),
    ],
)
def test_the_search_begins_near_what_was_measured(
    model, rows, length, remat, mu_dtype, gib
):
    """README.md, `bench train` on one H200 or H100."""
    on = mesh.make(dict.fromkeys(mesh.AXES, 1), jax.devices()[:1])
    size = StepSize(
        num_prompts=1, group_size=8, prompt_length=1, response_length=length - 1
    )
    policy = PolicySettings(remat=remat, rows=Layout(micro_batch_size=rows))
    actor = train.random_actor(shapes.find(model), on, policy, size, mu_dtype)
    state = actor.abstract_state()
    found = fitting.estimated(actor.policy, state, length, rows) / 2**30
    assert found == pytest.approx(gib, rel=0.25)


def test_devices_that_do_not_count_keep_the_whole_mini_batch(plain):
    assert hardware.memory_limit() is None
    assert plain.config.actor.micro_batch_size is None
    assert plain.actor.policy.layout.micro_batch_size is None
    assert not any("micro_batch_size" in text for text in plain.warnings)


def test_generation_is_told_what_others_hold_on_its_devices(plain, monkeypatch):
    told = []

    def programs(uses, prompts, resident):
        told.append(resident(jax.devices()[0]))
        return {}

    monkeypatch.setattr(plain.engine, "programs", programs)
    compiling.programs(plain)
    state = plain.actor.abstract_state()
    assert told == [sum(map(fitting.bytes_of, (state.params, state.opt_state)))]


def test_a_run_takes_as_many_rows_as_fit_and_keeps_them(
    monkeypatch, plain, tiny_model, tmp_path
):
    config = make_config(tiny_model, tmp_path, **ROWS)
    source, on = plain.source, plain.actor.mesh

    def needed(size):
        section = config.actor.model_copy(update={"micro_batch_size": size})
        changed = config.model_copy(update={"actor": section})
        actor = roles.actor_of(changed, source, on)
        return fitting.peak(actor.lower_largest_update().compile())

    fits = needed(16)
    sizes = fitting.kept(config, plain.actor, plain.engine, None, None)
    others = sizes["all devices"]["generation weights"]
    assert fitting.beside(config, sizes, "actor") == others
    limit = math.ceil((fits + others) / fitting.SURELY)
    guesses = {8: fits / 2, 16: fits, 32: 2 * fits}
    monkeypatch.setattr(fitting, "estimated", lambda *given: float(guesses[given[-1]]))
    monkeypatch.setattr(hardware, "memory_limit", lambda: limit)
    with traced() as found:
        job = built(config)
    assert found.count("update") == 1
    with traced() as again:  # what was compiled to choose is what the run uses
        job.actor.update(job.actor.start(), job.actor.largest_mini_batch(), seed=0)
    assert "update" not in again
    assert job.config.actor.micro_batch_size == 16
    assert job.actor.policy.layout.micro_batch_size == 16
    assert job.actor.settings.update.micro_batch_size == 16
    (said,) = [text for text in job.warnings if "micro_batch_size" in text]
    assert said.startswith("actor.micro_batch_size is not given: 16 of 32 rows at a ")

    # The run goes on with that, whatever the devices have then.
    monkeypatch.setattr(hardware, "memory_limit", lambda: 2**50)
    monkeypatch.setattr(fitting, "largest_fit", lambda *_, **__: pytest.fail("anew"))
    directory = Path(config.output_dir)
    (directory / "checkpoints" / "1").mkdir(parents=True)
    stored = directory / "config.yaml"
    stored.write_text(yaml.safe_dump(job.config.model_dump(mode="json")))
    job = built(config)
    assert job.config.actor.micro_batch_size == 16
    assert job.actor.policy.layout.micro_batch_size == 16
    assert "16 rows at a time, as the run began" in " ".join(job.warnings)
    stored.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    job = built(config)
    assert job.actor.policy.layout.micro_batch_size is None
    assert "all rows at a time, as the run began" in " ".join(job.warnings)


def test_a_critic_gets_what_fits_beside_the_actor(monkeypatch, tiny_model, tmp_path):
    asked = []

    def chosen(model, state, shape, room, make, lower, watch):
        asked.append((model.head, room))
        size = 16 if model.head == "tokens" else 8
        return fitting.Fit(size=size, made=make(size), needed=1, room=room)

    monkeypatch.setattr(fitting, "largest_fit", chosen)
    monkeypatch.setattr(hardware, "memory_limit", lambda: 2**30)
    job = built(make_config(tiny_model, tmp_path, **{"actor.use_kl_loss": True}))
    assert job.critic.model.layout.micro_batch_size == 8
    assert job.critic.settings.update.micro_batch_size == 8
    assert job.config.critic.micro_batch_size == 8
    assert job.actor.policy.layout.micro_batch_size == 16
    assert job.actor.reference.policy.layout.micro_batch_size == 16
    (held,) = fitting.kept(
        job.config, job.actor, job.engine, job.critic, job.reward_model
    ).values()
    both = held["generation weights"] + held["reference"]
    free = int(fitting.SURELY * 2**30) - both
    assert asked == [
        ("tokens", free - held["critic's weights"] - held["critic's optimizer"]),
        ("value", free - held["weights"] - held["optimizer"]),
    ]


@pytest.mark.slow
def test_a_run_with_the_size_it_found_is_that_with_the_size_given(
    monkeypatch, tiny_model, tmp_path
):
    def ran(name, **changed):
        config = make_config(tiny_model, tmp_path / name, **ROWS, **changed)
        loop.run(built(config))
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        kept = ("actor/", "critic/", "response_length/")
        return [
            {key: x for key, x in json.loads(line).items() if key.startswith(kept)}
            for line in lines
        ]

    given = ran("given", **{"actor.micro_batch_size": 16})
    monkeypatch.setattr(hardware, "memory_limit", lambda: 2**40)
    monkeypatch.setattr(fitting, "MOST_TOKENS", 2 * 16)  # two rows on a device
    found = ran("found", **{"trainer.total_training_steps": 2})
    assert found == given[: len(found)] and len(found) == 3
    monkeypatch.setattr(fitting, "MOST_TOKENS", 4 * 16)  # as if there were more room
    assert ran("found") == given
    report = (tmp_path / "found" / "run" / "report.html").read_text()
    assert "16 of 32 rows at a time" in report
