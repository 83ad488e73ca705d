import jax
import pytest

from jaxrl_llm import config, launch, models, planner
from jaxrl_llm.bench import shapes

GIB = 2**30


def settings(**more):
    values = {
        "output_dir": "unused",
        "model": {"path": "tiny"},
        "data": {
            "train": {"path": "unused.jsonl"},
            "train_batch_size": 8,
            "max_prompt_length": 128,
        },
        "rollout": {"n": 4, "max_response_length": 128, "mesh": {"tensor": 2}},
        "reward": {"functions": [{"name": "exact"}]},
        "actor": {"use_kl_loss": True, "micro_batch_size": 8, **more},
        "trainer": {"total_training_steps": 1},
    }
    return config.parse(values, "test")


@pytest.fixture(scope="module")
def planned():
    return planner.estimate(settings(), shapes.find("tiny"), jax.devices())


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
    # 32 responses of 256 tokens over 4 replicas: 8 of 4 pages, half as much for those
    # that wait, and page 0; 2 layers of keys and values, one of two heads of 16.
    assert planned.cache_bytes == 2 * 2 * (8 * 4 * 3 // 2 + 1) * 64 * 1 * 16 * 2
    assert planned.programs["decode"].extra_bytes > planned.cache_bytes


def test_every_program_of_a_step_is_there(planned):
    runs = {name: program.runs for name, program in planned.programs.items()}
    chunk = settings().rollout.decode_chunk
    assert runs == {
        "update": 1,
        "log-probabilities": 1,
        "prefill": 1,
        "decode": 128 // chunk,
        "reshard": 1,
    }
    for program in planned.programs.values():
        assert program.received_bytes > 0 and program.memory_traffic > 0
    most = max(program.extra_bytes for program in planned.programs.values())
    assert planned.peak_bytes == sum(planned.held.values()) + most


def test_what_does_not_fit_gets_advice_and_what_fits_none(planned):
    def advised(memory):
        return planner.advice(settings(), planned.__class__(
            **{**vars(planned), "capacity": memory}
        ))  # fmt: skip

    assert advised(1e9) == [] == advised(None)
    assert advised(planned.peak_bytes - 1)
    assert any("devices" in line for line in advised(sum(planned.held.values()) - 1))


def test_a_step_takes_as_long_as_what_is_slowest():
    program = planner.Program(
        extra_bytes=0, runs=1, flops=197e12, memory_traffic=8.2e11,
        received_bytes=3 * 9e10,
    )  # fmt: skip
    found = planner.Estimate(
        device_kind="TPU v5 lite", num_devices=1, held={}, cache_bytes=0,
        programs={"update": program}, capacity=None,
    )  # fmt: skip
    assert found.seconds(program) == pytest.approx(3)


def test_every_program_compiles_for_a_tpu(capsys, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU compiler is the package libtpu")
    path = tmp_path / "config.yaml"
    path.write_text(settings().model_dump_json(exclude_unset=True))
    assert launch.main(["plan", str(path), "--topology", "v5e:2x4"]) == 0
    shown = capsys.readouterr().out
    for name in ("update", "log-probabilities", "prefill", "decode", "reshard"):
        assert f"+ {name}" in shown
    assert "8 x TPU v5 lite" in shown and "15.75" in shown and "fits" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "needs --topology, such as v5p:4x4x4, or a number of --devices; got nei"),
        (["--devices", "many"], "got many"),
        (["--devices", "8", "--memory", "lots"], "such as 141GB or 80GiB, got 'lots'"),
    ],
)
def test_what_is_missing_is_said(arguments, message, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(settings().model_dump_json(exclude_unset=True))
    assert launch.main(["plan", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_critic_is_refused():
    gae = settings().model_copy(
        update={"algorithm": settings().algorithm.model_copy(
            update={"adv_estimator": "gae"}
        )}
    )  # fmt: skip
    with pytest.raises(ValueError, match="a critic's update is not planned"):
        planner.estimate(gae, shapes.find("tiny"), jax.devices())
