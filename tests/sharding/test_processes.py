"""Many processes on one machine, over loopback, with CPU devices."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import chex
import jax
import layouts
import learnable
import numpy as np
import pytest
import tensorboard_events
import tiny
import waiting
import yaml
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from jaxrl_llm import cli as launch
from jaxrl_llm.config import parsing
from jaxrl_llm.sharding import mesh, processes
from jaxrl_llm.tracking import run_directory
from jaxrl_llm.training.build import build, make_meshes
from jaxrl_llm.training.checkpoint import Checkpoints

SAME, OTHER = layouts.same_devices(), layouts.other_devices()
HERE = pathlib.Path(__file__).parent.parent / "support"
DEVICES, STEPS = 4, 3
# Where nobody is lost, nobody may seem so because the machine is busy.
LOST_AFTER_S, NEVER_S = 6, 120


def test_shares_are_consecutive_even_and_complete(monkeypatch):
    def shares(count, of):
        monkeypatch.setattr(jax, "process_count", lambda: of)
        found = []
        for index in range(of):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            found.append(processes.share(list(range(count))))
        return found

    assert shares(7, of=3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert shares(2, of=4) == [[], [0], [], [1]]
    assert shares(5, of=1) == [[0, 1, 2, 3, 4]]


def test_a_process_alone_gathers_its_own_value_and_leads():
    with processes.joined():
        assert processes.gather({"a": 1}) == [{"a": 1}]
        assert processes.leads()


def test_arrays_are_placed_split_and_fetched_whole():
    sharding = NamedSharding(mesh.make({"data": 4, "tensor": 2}), P("data", "tensor"))
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    placed = processes.place({"x": x, "scalar": np.float32(3)}["x"], sharding)
    assert placed.sharding == sharding
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
    np.testing.assert_array_equal(processes.fetch(placed), x)
    whole = processes.place(np.float32(3), NamedSharding(sharding.mesh, P()))
    assert whole == 3 and whole.shape == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("host:1", 2, None), "process-id: not given, and no cluster tells"),
        ((None, 2, 0), "coordinator: not given, and no cluster tells"),
        (("host", 2, 0), "coordinator 'host' is not HOST:PORT"),
        (("host:1", 2, 2), "process-id 2 does not fit num-processes 2"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message), processes.joined(*arguments):
        pass


def test_an_option_that_is_no_number_is_named(capsys):
    assert launch.main(["train", "x.yaml", "--num-processes", "two"]) == 2
    assert "--num-processes is a number, got 'two'" in capsys.readouterr().err


def test_slurm_says_who_the_processes_are(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    # The port is 65535 - 4096 + 1 + 4097 % 4096.
    assert processes._settings(None, None, None, 1) == ("node07:61441", 8, 5, [1])
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert processes._settings(None, None, None, 1) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rollout.engine": "vllm"}, "rollout.engine vllm works with one process"),
        ({"data.train_batch_size": 1}, "data.train_batch_size 1 leaves some of 2"),
    ],
)
def test_work_that_processes_cannot_share_is_refused(change, message, monkeypatch):
    values = {
        "output_dir": "x",
        "model": {"path": "x"},
        "data": {"train": {"path": "x"}, "train_batch_size": 4},
        "reward": {"functions": [{"name": "exact"}]},
        "trainer": {"total_training_steps": 1},
    }
    for key, value in change.items():
        parsing.put(values, key.split("."), value)
    monkeypatch.setattr(processes, "of", lambda mesh: 2)
    with pytest.raises(parsing.ConfigError, match=message):
        make_meshes(parsing.parse(values, "values"))


class Group:
    """The processes of one run. A context manager that leaves none behind."""

    def __init__(self, count, command, **environment):
        """`command` makes python's arguments of (coordinator's address, index)."""
        # Held to the end, so that nobody else is given the port that it picks; the
        # coordinator may have it all the same, as gRPC sets the option too.
        self.held = socket.socket()
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.held.bind(("127.0.0.1", 0))
        self.port = str(self.held.getsockname()[1])
        address = f"127.0.0.1:{self.port}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
            "PYTHONPATH": str(HERE.parents[1]),
            **environment,
        }
        self.members = [
            subprocess.Popen(
                [sys.executable, *command(address, index)],
                cwd=HERE,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for index in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.held.close()
        for member in self.members:
            if member.poll() is None:
                member.kill()
            member.communicate()

    def wait(self):
        """(status, what was printed) of each, in order."""
        return [(p.communicate(timeout=900)[0], p.returncode) for p in self.members]

    def until(self, holds):
        """Returns once the condition holds; none may end before."""

        def still():
            for member in self.members:
                assert member.poll() is None, member.stdout.read()
            return holds()

        waiting.until(still)

    def services(self):
        """Coordination services of this group that run, as far as the system tells."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_text().split("\0")
                if "jaxrl_llm.sharding.coordinator" in words and self.port in words:
                    found.append(path.parent.name)
        return found


WORK = """
import os, signal, sys
import chex
import jax
from jaxrl_llm.sharding import processes
address, index, victim, how, lost_after_s = sys.argv[1:]
index, lost_after_s = int(index), float(lost_after_s)
with processes.joined(address, 3, index, lost_after_s=lost_after_s):
    assert jax.process_count() == 3
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    for size in (7, 7000):  # every program that there is, where not all bytes are alike
        assert len(processes.gather("x" * size)) == 3
    assert compiled
    compiled.clear()
    found = processes.gather(str(index) * 7 * 10 ** (3 * index))
    assert found == ["0" * 7, "1" * 7000, "2" * 7000000]
    assert not compiled, compiled
    shares = processes.gather(list(processes.share(range(5))))
    assert sum(shares, []) == [0, 1, 2, 3, 4], shares
    if victim == str(index):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no luck")
    processes.gather("all are here")
print("done")
"""


def work(victim, how):
    lost_after = str(NEVER_S if how == "well" else LOST_AFTER_S)

    def command(address, index):
        return ["-c", WORK, address, str(index), victim, how, lost_after]

    with Group(3, command) as group:
        found = group.wait()
        if how == "well":
            assert not group.services()
        # Otherwise it stays for the others to ask.
        waiting.until(lambda: not group.services())
    return found


@pytest.mark.slow  # before one is killed, as below, all gather the same
def test_values_of_any_size_are_gathered_by_all():
    for said, status in work("none", "well"):
        assert (status, said.splitlines()[-1]) == (0, "done"), said


@pytest.mark.parametrize("victim", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_the_others_stop_and_name_the_process_that_was_killed(victim):
    for index, (said, status) in enumerate(work(victim, "killed")):
        if str(index) == victim:
            assert status == -signal.SIGKILL
            continue
        assert status == 1, said
        last = said.splitlines()[-1]
        host = socket.gethostname()
        assert f"process {victim} of 3 on {host} is lost: nothing was" in last, said
        assert f"process {index} stops" in last


@pytest.mark.slow
def test_the_others_stop_and_say_why_one_failed():
    for index, (said, status) in enumerate(work("1", "failed")):
        assert status == 2  # as for any ValueError
        last = said.splitlines()[-1]
        if index == 1:
            assert last == "ValueError: no luck"
        else:
            assert "process 1 of 3" in last and "failed: no luck" in last, said


RESHARD = """
import sys
import jax, numpy as np
from jaxrl_llm.sharding import checksum, processes, reshard
from jaxrl_llm.sharding import transfer_plan as plan
address, count, index, *some = sys.argv[1:]
with processes.joined(address, int(count), int(index), lost_after_s=120):
    import layouts
    bits = np.random.default_rng(0).integers(0, 2**32, (24, 48), np.uint32)
    for of in (layouts.same_devices(), layouts.other_devices()):
        for name in [name for name in of if name in some or not some]:
            held = processes.place(bits, of[name])
            source = {other: held for other in of}
            target = {
                other: jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=of[other])
                for other in of
            }
            way = plan.plan(source, target)
            moved = reshard.reshard(source, way)
            for other, x in moved.items():
                assert x.sharding == of[other]
                for shard in x.addressable_shards:
                    np.testing.assert_array_equal(shard.data, bits[shard.index])
            checksum.verify(moved, way, checksum.expected(source, way))
            print("moved", name, flush=True)
"""
FROM = ["data2 fsdp4", "middle three"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, some",
    [(2, FROM[1:]), pytest.param(2, [], marks=pytest.mark.slow),
     pytest.param(4, FROM, marks=pytest.mark.slow)],
    ids=["two", "two, every pair", "four"],
)  # fmt: skip
def test_every_bit_arrives_between_processes(count, some):
    def command(address, index):
        return ["-c", RESHARD, address, str(count), str(index), *some]

    group = Group(
        count,
        command,
        JAX_NUM_CPU_DEVICES=str(8 // count),
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    with group:
        for said, status in group.wait():
            assert status == 0, said
            assert said.count("moved ") == len(some or [*SAME, *OTHER])


@pytest.fixture(scope="module")
def values(tiny_model, tmp_path_factory):
    """A configuration, but for its output_dir. Of four processes, one has no question
    to validate on."""
    values = learnable.values(tiny_model, tmp_path_factory.mktemp("questions"))
    values["actor"]["optim"]["lr"] = 0.005
    values["actor"]["mesh"] = {"data": 1, "fsdp": -1}
    values["trainer"] = {"total_training_steps": STEPS, "save_freq": 1, "test_freq": 2}
    return values


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def training(
    count,
    values,
    directory,
    cache,
    changes=(),
    lost_after_s=NEVER_S,
    gate="",
    verb="train",
):
    """`jaxrl train` in so many processes, or another verb; for `gate` see
    `waiting.at_the_gate`."""
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"output_dir": str(directory), **values}))

    def command(address, index):
        options = f"--coordinator {address} --num-processes {count} --process-id"
        options = [*options.split(), str(index), f"--lost-after={lost_after_s}"]
        start = ["-m", "jaxrl_llm", verb, str(path), *changes]
        return start + (options if count > 1 else [])

    return Group(
        count,
        command,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        GATE=gate,
    )


def trained(count, values, directory, cache, changes=(), verb="train"):
    with training(count, values, directory, cache, changes, verb=verb) as group:
        for said, status in group.wait():
            assert status == 0, said
    return directory


@pytest.fixture(scope="module")
def alone(values, cache, tmp_path_factory):
    """What one process makes of it."""
    return trained(1, values, tmp_path_factory.mktemp("runs") / "alone", cache)


def final_state(directory):
    job = build(parsing.load(directory / "config.yaml"))
    with Checkpoints(directory / "checkpoints", 9) as checkpoints:
        step, state, _ = checkpoints.restore(job.abstract_state())
    assert step == STEPS
    return jax.device_get(state)


def assert_same_run(directory, alone):
    """The same completions, bit for bit, the same metrics to 1e-5, and weights to 1e-4:
    AdamW divides by the gradient's size, and so makes much of its rounding."""
    for file in (alone / "rollouts").iterdir():
        lines = zip(*(
            map(json.loads, (run / "rollouts" / file.name).read_text().splitlines())
            for run in (directory, alone)
        ), strict=True)  # fmt: skip
        for got, wanted in lines:
            assert got["tokens"] == wanted["tokens"]
            assert got.keys() == wanted.keys()
    assert_same_metrics(directory, alone)
    chex.assert_trees_all_close(
        final_state(directory), final_state(alone), rtol=1e-4, atol=1e-4
    )


def assert_same_metrics(directory, alone):
    for got, wanted in zip(
        run_directory.read(directory), run_directory.read(alone), strict=True
    ):
        got, wanted = (
            {k: v for k, v in x.items() if not k.startswith(("timing_s/", "perf/"))}
            for x in (got, wanted)
        )
        assert got.keys() == wanted.keys()
        for name in got:
            np.testing.assert_allclose(
                got[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_train_to_the_numbers_of_one(
    count, alone, values, cache, tmp_path
):
    run = trained(count, values, tmp_path / "many", cache)
    assert_same_run(run, alone)
    versions = json.loads((run / "versions.json").read_text())
    assert (versions["num_processes"], versions["num_devices"]) == (count, DEVICES)
    names = {path.name for path in (run / "huggingface").iterdir()}
    assert names == {path.name for path in (alone / "huggingface").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        [
            "--algorithm.adv_estimator=gae",
            "--critic.dtype=float32",
            "--critic.remat=none",
            "--algorithm.use_kl_in_reward=true",
            "--algorithm.kl_ctrl.type=adaptive",
            "--actor.ppo_mini_batch_size=2",
        ],
        ["--algorithm.adv_estimator=remax", "--actor.use_kl_loss=true"],
        ["--algorithm.filter_groups.metric=reward", "--rollout.mesh.tensor=2"],
    ],
    ids=["critic", "greedy", "filtered"],
)
def test_two_processes_do_so_with_other_algorithms(changes, values, cache, tmp_path):
    runs = [
        trained(count, values, tmp_path / str(count), cache, changes)
        for count in (2, 1)
    ]
    assert_same_run(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_play_the_episodes_of_one(count, values, cache, tmp_path):
    changes = [
        "--agent.environment=letters:Letters",
        "--agent.isolation=thread",
        "--agent.max_tokens=80",
        "--data.max_prompt_length=64",
        f"--rollout.stop_token_ids={list(range(120))}",
        "--reward.functions=[]",
        "--trainer.total_training_steps=2",
        "--trainer.test_freq=1",
    ]
    runs = [trained(n, values, tmp_path / str(n), cache, changes) for n in (count, 1)]
    several, one = (
        [
            {**line, "reward": 0, "scores": {}, "advantage": 0}
            for file in sorted((run / "rollouts").iterdir())
            for line in map(json.loads, file.read_text().splitlines())
        ]
        for run in runs
    )
    assert several == one
    assert sum(len(record["turns"]) > 2 for record in one) > len(one) / 2
    for many, alone in list(zip(*map(run_directory.read, runs), strict=True))[1:]:
        for name in ("critic/rewards/mean", "agent/turns/mean", "response_length/mean"):
            assert many[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.slow
def test_four_processes_ask_a_reward_model_together(values, cache, tmp_path):
    changes = [
        f"--reward.model.path={tiny.reward_model(tmp_path / 'judge')}",
        "--reward.model.dtype=float32",
        "--algorithm.adv_estimator=remax",
    ]
    runs = [
        trained(count, values, tmp_path / str(count), cache, changes)
        for count in (4, 1)
    ]
    assert_same_run(*runs)
    line = run_directory.read(runs[0])[1]
    assert line["reward/reward_model/mean"] != 0 != line["reward/small_ids/mean"]


@pytest.mark.slow
def test_two_processes_evaluate_to_the_numbers_of_one(alone, values, cache, tmp_path):
    models = ["--models", values["model"]["path"], str(alone / "checkpoints" / "2")]
    found = []
    for count in (2, 1):
        to = tmp_path / str(count)
        trained(count, values, to, cache, models, verb="evaluate")
        assert {path.name for path in to.iterdir()} == {"eval.json", "eval.jsonl"}
        answers = (to / "eval.jsonl").read_text().splitlines()
        said = json.loads((to / "eval.json").read_text())["models"]
        found.append(([json.loads(line)["tokens"] for line in answers], said))
    (many, (first, second)), (one, wanted) = found
    # Two samples and one greedy answer of each of two models to three questions.
    assert many == one and len(one) == 2 * 3 * (2 + 1)
    assert [first, second] == wanted
    assert first["metrics"] != second["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sft", "rm", "dpo"])
def test_two_processes_learn_from_rows_to_the_numbers_of_one(
    verb, values, cache, tmp_path
):
    pairs = {"chosen": "abc", "rejected": "xyz"}
    answers = {"completion": "abc"} if verb == "sft" else pairs
    rows = [
        json.dumps(
            {"prompt": f"{i} and {j}:"} | {k: x[: 1 + j] for k, x in answers.items()}
        )
        for i in range(5)
        for j in range(3)
    ]
    for name, some in (("rows", rows[:11]), ("held_out", rows[11:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    asked = {
        "data": {"val_prompts": values["data"]["val"], "max_prompt_length": 48},
        "rollout": {k: x for k, x in values["rollout"].items() if k != "n"},
        "reward": values["reward"],
        "val": values["val"],
    }
    offline = {
        "task": verb,
        "model": values["model"],
        "data": {
            "train": {"path": str(tmp_path / "rows.jsonl")},
            "val": {"path": str(tmp_path / "held_out.jsonl")},
            "train_batch_size": 4,
            "max_length": 16,
        },
        "learner": {
            "optim": {"lr": 0.005},
            "mesh": {"data": 1, "fsdp": -1},
            "dtype": "float32",
            "remat": "none",
        },
        "trainer": {
            **values["trainer"], "loggers": ["tensorboard"], "num_examples": 0,
        },
    }  # fmt: skip
    if verb != "rm":  # which answers nothing
        offline["data"] |= asked.pop("data")
        offline |= asked
    many, one = (
        trained(count, offline, tmp_path / str(count), cache, verb=verb)
        for count in (2, 1)
    )
    versions = json.loads((many / "versions.json").read_text())
    assert (versions["num_processes"], versions["num_devices"]) == (2, DEVICES)
    assert_same_metrics(many, one)
    assert len(run_directory.read(one)) == STEPS + 1
    of_tensorboard = [
        [
            (step, value.tag, value.simple_value)
            for step, value in tensorboard_events.read(run / "tensorboard")
            if value.tag == f"{verb}/loss"
        ]
        for run in (many, one)
    ]
    assert [step for step, *_ in of_tensorboard[0]] == [1, 2, 3]
    for got, wanted in zip(*of_tensorboard, strict=True):
        assert got[:2] == wanted[:2] and got[2] == pytest.approx(wanted[2], rel=1e-5)
    got, wanted = (
        load_file(run / "huggingface" / "model.safetensors") for run in (many, one)
    )
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-4)
    for file in sorted((one / "rollouts").iterdir()):
        tokens = [
            [
                json.loads(line)["tokens"]
                for line in (run / "rollouts" / file.name).read_text().splitlines()
            ]
            for run in (many, one)
        ]
        assert tokens[0] == tokens[1] != []


@pytest.mark.slow
def test_a_run_that_lost_a_process_goes_on_and_one_asked_to_stop_stops_all(
    alone, values, cache, tmp_path
):
    run, gate = tmp_path / "killed", tmp_path / "gate"
    gate.mkdir()

    def all_wait(group):
        return len(list(gate.iterdir())) == len(group.members)

    def open_gate():
        for waits in gate.iterdir():
            waits.unlink()

    # In the middle of step 2, after two scores of the first validation and one step.
    with training(
        2, values, run, cache, lost_after_s=LOST_AFTER_S, gate=f"4:{gate}"
    ) as group:
        saved = run / "checkpoints" / "1"
        group.until(lambda: all_wait(group) and saved.exists())
        group.members[1].kill()
        said = group.members[0].communicate(timeout=900)[0]
        assert group.members[0].returncode == 1
        assert "process 1 of 2" in said.splitlines()[-1]
        lost = f"is lost: nothing was heard of it for {LOST_AFTER_S} s"
        assert lost in said.splitlines()[-1]
    open_gate()
    # Only one of them hears SIGTERM, in the middle of step 2.
    patient = values | {"trainer": values["trainer"] | {"stop_grace_s": 300}}
    with training(2, patient, run, cache, gate=f"1:{gate}") as group:
        group.until(lambda: all_wait(group))
        group.members[1].terminate()
        open_gate()
        (said, status), (_, other) = group.wait()
        assert (status, other) == (75, 75), said
        assert "going on from step 1" in said
        assert f"stopped after step 2 of {STEPS}" in said
    assert_same_run(trained(2, values, run, cache), alone)
