import collections
import gc

import jax
import pytest

from jaxrl_llm import cli as launch
from jaxrl_llm import models
from jaxrl_llm.bench import step
from jaxrl_llm.config import parsing
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.planning import dry_run, planner, workload
from jaxrl_llm.training import fitting

GIB = 2**30


def settings(changed=None, **more):
    values = {
        "output_dir": "unused",
        "model": {"path": "tiny"},
        "data": {
            "train": {"path": "unused.jsonl"},
            "train_batch_size": 8,
            "max_prompt_length": 64,
        },
        "rollout": {"n": 4, "max_response_length": 64, "mesh": {"tensor": 2}},
        "reward": {"functions": [{"name": "exact"}]},
        "actor": {"use_kl_loss": True, "micro_batch_size": 8, **more},
        "trainer": {"total_training_steps": 1},
    }
    return parsing.parse(values | (changed or {}), "test")


@pytest.fixture(scope="module", autouse=True)
def donation():
    """`debug_nans`, which the tests set, keeps what is donated."""
    jax.config.update("jax_debug_nans", False)
    yield
    jax.config.update("jax_debug_nans", True)


@pytest.fixture(scope="module")
def planned(donation):
    [found] = planner.estimate(settings(), jax.devices())
    return found


@pytest.mark.slow
def test_what_stays_is_the_size_of_its_arrays(planned):
    count = models.num_params(shapes.find("tiny"))
    # Split over eight devices, but for norms: AdamW has two moments, the reference is
    # bfloat16, and half of the engine's bfloat16 weights are on each device.
    wanted = {
        "weights": 4 * count / 8,
        "optimizer": 8 * count / 8,
        "reference": 2 * count / 8,
        "engine's weights": 2 * count / 2,
    }
    for name, size in wanted.items():
        assert planned.held[name] == pytest.approx(size, rel=0.05), name
    # 32 responses of 128 tokens over 4 replicas: 8 of 2 pages, half as much for those
    # that wait, and page 0; 2 layers of keys and values, one of two heads of 16.
    assert planned.cache_bytes == 2 * 2 * (8 * 2 * 3 // 2 + 1) * 64 * 1 * 16 * 2
    assert planned.programs["decode"].extra_bytes > planned.cache_bytes


@pytest.mark.slow
def test_a_base_is_counted_once_for_all_that_train_adapters_beside_it(planned):
    adapters = {"lora": {"rank": 8}}
    changed = {"algorithm": {"adv_estimator": "gae"}, "critic": dict(adapters)}
    [found] = planner.estimate(settings(changed, **adapters), jax.devices())
    arch = shapes.find("tiny")
    lora = models.Lora(rank=8)
    shapes_of = jax.tree.leaves(models.abstract_adapters(arch, lora))
    is_axes = {"is_leaf": lambda x: isinstance(x, tuple)}
    axes = jax.tree.leaves(models.adapter_axes(lora), **is_axes)
    # Of an adapter FSDP splits the half that has the model's width.
    trained = sum(
        x.size / (8 if "embed" in names else 1)
        for x, names in zip(shapes_of, axes, strict=True)
    )
    wanted = {
        "weights": 4 * trained,
        "optimizer": 8 * trained,
        "frozen weights": 2 * models.num_params(arch) / 8,
        "reference": 0,
        "reference's frozen weights": 0,
        "critic's weights": 4 * trained,
        "critic's frozen weights": 0,
    }
    for name, size in wanted.items():
        assert found.held[name] == pytest.approx(size, rel=0.05), name
    assert {"values", "critic's update"} < set(found.programs)
    update, whole = (x.programs["update"] for x in (found, planned))
    assert update.flops < whole.flops and update.extra_bytes < whole.extra_bytes


@pytest.mark.slow
def test_every_program_of_a_step_is_there(planned):
    runs = {name: program.runs for name, program in planned.programs.items()}
    chunk = settings().rollout.decode_chunk
    assert runs == {
        "update": 1,
        "reference's log-probabilities": 1,
        "prefill": 1,
        "decode": 64 // chunk,
        "reshard": 1,
    }
    for program in planned.programs.values():
        assert program.received_bytes > 0 and program.memory_traffic > 0
    most = max(program.extra_bytes for program in planned.programs.values())
    assert planned.peak_bytes == sum(planned.held.values()) + most


@pytest.mark.slow
def test_what_does_not_fit_gets_advice_and_what_fits_none(planned):
    def advised(memory):
        return dry_run.advice(settings(), planned.__class__(
            **{**vars(planned), "capacity": memory}
        ))  # fmt: skip

    assert advised(1e9) == [] == advised(None)
    assert advised(planned.peak_bytes - 1)
    assert any("devices" in line for line in advised(sum(planned.held.values()) - 1))


def test_a_step_takes_as_long_as_what_is_slowest():
    program = workload.Program(
        extra_bytes=0, runs=1, flops=197e12, memory_traffic=8.2e11,
        received_bytes=3 * 9e10,
    )  # fmt: skip
    found = planner.Estimate(
        group="all devices", device_kind="TPU v5 lite", num_devices=1,
        num_processes=1, held={},
        cache_bytes=0, wanted_cache_bytes=0, programs={"update": program},
        capacity=None,
    )  # fmt: skip
    assert found.seconds(program) == pytest.approx(3)


@pytest.mark.slow  # test_tpu compiles decode steps
def test_every_program_compiles_for_a_tpu(capsys, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is the package libtpu")
    path = tmp_path / "config.yaml"
    # Of one token: it takes long to compile eight, as test_tpu does.
    rollout = {"n": 4, "max_response_length": 64, "decode_chunk": 1}
    config = settings({"rollout": {**rollout, "mesh": {"tensor": 2}}})
    path.write_text(config.model_dump_json(exclude_unset=True))
    assert launch.main(["plan", str(path), "--topology", "v5e:2x4"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "update",
        "reference's log-probabilities",
        "prefill",
        "decode",
        "reshard",
    ):
        assert f"+ {name}" in shown
    assert "8 x TPU v5 lite" in shown and "15.75" in shown and "fits" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs --topology, such as v5p:4x4x4 or h100:8, or a number of --dev"),
        (["--devices", "many"], "--devices is a number, got 'many'"),
        (["--devices", "8", "--measure", "few"], "--measure is a number, got 'few'"),
        (["--devices", "8", "--memory", "lots"], "such as 141GB or 80GiB, got 'lots'"),
    ],
)
def test_what_is_missing_is_said(arguments, message, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(settings().model_dump_json(exclude_unset=True))
    assert launch.main(["plan", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


GAE = {"algorithm": {"adv_estimator": "gae"}}


@pytest.mark.slow
def test_a_critic_is_held_judges_and_learns():
    [found] = planner.estimate(settings(GAE, use_kl_loss=False), jax.devices())
    # The policy's shape, tied matrices and all, and one number per width as its head.
    assert found.held["critic's weights"] == pytest.approx(
        found.held["weights"], rel=0.02
    )
    assert {"values", "critic's update"} < found.programs.keys()
    assert found.programs["critic's update"].flops == found.programs["update"].flops
    assert found.programs["values"].flops * 4 == found.programs["update"].flops


@pytest.mark.slow
def test_every_group_is_planned_by_itself():
    placement = {
        "groups": {"learn": "0-3", "judge": "4,5", "generate": "6-7"},
        "actor": "learn",
        "critic": "judge",
        "rollout": "generate",
    }
    found = planner.estimate(
        settings(GAE | {"placement": placement}), jax.devices(), memory=1e9
    )
    count = models.num_params(shapes.find("tiny"))
    plans = {one.group: one for one in found}
    assert {name: set(one.held) for name, one in plans.items()} == {
        "learn": {"weights", "optimizer", "reference"},
        "judge": {"critic's weights", "critic's optimizer"},
        "generate": {"engine's weights"},
    }
    assert {name: set(one.programs) for name, one in plans.items()} == {
        "learn": {"update", "reference's log-probabilities", "reshard"},
        "judge": {"values", "critic's update"},
        "generate": {"prefill", "decode", "reshard"},
    }
    for name, devices in {"learn": 4, "judge": 2}.items():
        whose = "critic's " if name == "judge" else ""
        assert plans[name].num_devices == devices
        assert plans[name].held[f"{whose}weights"] == pytest.approx(
            4 * count / devices, rel=0.05
        )
    moved = plans["generate"].programs["reshard"].received_bytes
    assert moved == plans["generate"].held["engine's weights"]
    assert plans["learn"].programs["reshard"].received_bytes == 0
    assert plans["learn"].programs["reshard"].extra_bytes > 0


@pytest.mark.slow
def test_the_cache_takes_what_memory_leaves_it():
    [found] = planner.estimate(settings(), jax.devices(), memory=500_000)
    page = 2 * 2 * 64 * 1 * 16 * 2  # 2 layers, keys and values, one head of 16
    free = 500_000 - sum(found.held.values())
    assert found.cache_bytes == 0.9 * free // page * page < found.wanted_cache_bytes


def test_a_plan_takes_the_rows_that_a_run_would(monkeypatch):
    config = settings(GAE, use_kl_loss=False, micro_batch_size=None)
    assert planner.completed(config, jax.devices()) == (config, [])  # not known
    given = settings(GAE)
    assert planner.completed(given, jax.devices(), memory=1e9) == (given, [])
    rooms = []

    def chosen(model, state, shape, room, make, lower, watch):
        rooms.append((model.head, shape, room))
        return fitting.Fit(size=16, made=make(16), needed=1, room=room)

    monkeypatch.setattr(fitting, "largest_fit", chosen)
    found, said = planner.completed(config, jax.devices(), memory=10**9)
    assert found.actor.micro_batch_size == found.critic.micro_batch_size == 16
    assert [line.split(" is ")[0] for line in said] == [
        "actor.micro_batch_size",
        "critic.micro_batch_size",
    ]
    count = models.num_params(shapes.find("tiny"))
    engine, critic = 2 * count / 2, 12 * count / 8
    (head, shape, room), _ = rooms
    assert (head, shape) == ("tokens", (32, 128))
    assert 0.95e9 - room == pytest.approx(engine + critic, rel=0.05)


def test_steps_are_measured_only_on_the_devices_of_the_plan(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(planner, "here", lambda count: (jax.devices()[:count], None))
    path = tmp_path / "config.yaml"
    path.write_text(settings().model_dump_json(exclude_unset=True))
    assert launch.main(["plan", str(path), "--devices", "4", "--measure", "1"]) == 2
    assert "on the 8 devices that are here" in capsys.readouterr().err


def test_what_a_compiler_gives_up_on_is_planned_by_its_own_count():
    def lower():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (16.50G) exceeds available HBM (15.75G)."
        )

    program = workload.Work(
        lower=lower, kept=2 * GIB, num_devices=1, runs=1, flops=0.0, memory_traffic=0
    ).compile()
    assert program.extra_bytes == 14.5 * GIB and program.received_bytes is None


def test_another_engine_is_refused():
    vllm = settings(
        {"rollout": {"engine": "vllm", "vllm": {"urls": ["http://localhost:1"]}}}
    )
    with pytest.raises(parsing.ConfigError, match="rollout.engine vllm"):
        planner.estimate(vllm, jax.devices())


def programs():
    """(name, bytes with arguments and results) of all that are loaded."""
    found = collections.Counter()
    for executable in jax.devices()[0].client.live_executables():
        of = executable.get_compiled_memory_stats()
        size = of.argument_size_in_bytes + of.output_size_in_bytes
        size += of.temp_size_in_bytes - of.alias_size_in_bytes
        found[executable.hlo_modules()[0].name, size] += 1
    return found


@pytest.mark.slow
def test_a_run_needs_the_memory_that_was_planned(planned):
    """Measured: arrays that live after a step, and the programs that the step ran."""
    jax.clear_caches()
    gc.collect()
    before = programs()
    held, _ = step.measure(settings(), shapes.find("tiny"), 1)
    sizes = {}
    for name, size in programs() - before:
        sizes[name] = max(size, sizes.get(name, 0))
    assert held == pytest.approx(sum(planned.held.values()), rel=0.01)
    stays = {
        "update": ("jit_update", ["weights", "optimizer"]),
        "reference's log-probabilities": ("jit_whole", ["reference"]),
        "prefill": ("jit_prefill", ["engine's weights"]),
        "decode": ("jit_decode", ["engine's weights"]),
    }
    for name, (module, kept) in stays.items():
        wanted = planned.programs[name].extra_bytes + sum(map(planned.held.get, kept))
        assert wanted == pytest.approx(sizes[module], rel=0.01), name


@pytest.mark.slow
def test_what_was_measured_is_printed_beside_the_plan(planned, capsys):
    held, peak = sum(planned.held.values()), planned.peak_bytes
    dry_run.show_measured([planned], held, round(1.05 * peak))
    dry_run.show_measured([planned], held, None)
    shown = capsys.readouterr().out
    assert "1.000" in shown and "1.050" in shown
    assert "not counted" in shown  # a CPU has no allocator that counts
