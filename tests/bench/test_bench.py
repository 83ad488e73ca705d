import functools
import importlib
import itertools
import json
import math

import jax
import pytest
import shown_flags

from jaxrl_llm import bench, cli
from jaxrl_llm.bench import reshard, rollout, step, train
from jaxrl_llm.models import known_shapes as shapes
from jaxrl_llm.rollout.engine import Request, Sampling


@pytest.fixture
def measured(capsys):
    """Runs a measurement; the figures that it prints, one per variant."""

    def run(*arguments):
        bench.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    return run


@pytest.mark.parametrize("name", bench.NAMES)
def test_every_flag_of_a_measurement_that_is_shown_works(name, monkeypatch, capsys):
    measurement = importlib.import_module(f"jaxrl_llm.bench.{name}")
    given = {}
    told = functools.wraps(measurement.main)(lambda **options: given.update(options))
    monkeypatch.setattr(measurement, "main", told)
    with pytest.raises(SystemExit):
        cli.main(["bench", name, "--tyro-print-completion", "bash"])
    options = shown_flags.by_flag(shown_flags.spec(capsys.readouterr().out))
    assert all(" • (" not in option["description"] for option in options.values())
    for arguments in shown_flags.all_used(options):
        assert cli.main(["bench", name, *arguments]) == 0
        assert {f"--{key}".replace("_", "-") for key in given} <= set(options)
        shown_flags.check_given(given, arguments)


@pytest.mark.slow
def test_the_update_is_measured_once_per_variant_on_equal_work(measured):
    lines = measured(
        "train", "--model", "tiny", "--dtype", "float32", "--steps", "1",
        "--sequences", "16", "--length", "32", "--prompt-length", "4",
        "--micro-batch-size", "8", "--remat", "none", "full", "--fsdp", "8",
    )  # fmt: skip
    assert [line["remat"] for line in lines] == ["none", "full"]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)
    for line in lines:
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(16 * 32)
        assert line["token_efficiency"] == 1.0


@pytest.mark.slow
def test_the_update_of_adapters_is_measured_beside_that_of_all_weights(measured):
    def line(*rank):
        (found,) = measured(
            "train", "--model", "tiny", "--dtype", "float32", "--steps", "1",
            "--sequences", "16", "--length", "32", "--prompt-length", "4",
            "--micro-batch-size", "8", "--remat", "dots", "--fsdp", "8", *rank,
        )  # fmt: skip
        return found

    whole, adapters = line(), line("--lora-rank", "2")
    assert (whole["lora_rank"], adapters["lora_rank"]) == (None, 2)
    # Both have learned next to nothing.
    assert adapters["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert adapters["peak_bytes"] < whole["peak_bytes"]


@pytest.mark.slow
def test_the_phases_of_a_measured_step_add_up(measured):
    (line,) = measured(
        "step", "--model", "tiny", "--dtype", "float32", "--steps", "1",
        "--prompts", "4", "--n", "2", "--prompt-length", "8", "--mean", "8",
        "--cap", "16", "--pack-length", "64", "--micro-batch-size", "1",
        "--max-num-seqs", "8", "--decode-chunk", "4",
    )  # fmt: skip
    phases = ("gen", "reward", "adv", "update_actor", "update_weights", "the rest")
    seconds = [line[f"{phase}_seconds"] for phase in phases]
    assert math.fsum(seconds) == pytest.approx(line["step_seconds"])
    assert min(seconds) > 0
    other = 1 - (seconds[0] + seconds[3]) / line["step_seconds"]
    assert line["neither_rollout_nor_update"] == pytest.approx(other)


@pytest.mark.slow
def test_an_engine_is_measured_on_all_that_was_asked(measured):
    (line,) = measured(
        "rollout", "--model", "tiny", "--prompts", "4", "--n", "2", "--length", "8",
        "--prompt-length", "20", "--dtype", "float32", "--max-num-seqs", "8",
        "--rounds", "1",
    )  # fmt: skip
    assert line["tokens_per_second"] * line["seconds"] == pytest.approx(4 * 2 * 8)
    assert line["ms_per_step"] * 8 == pytest.approx(1e3 * line["seconds"])


def test_the_floor_of_an_engine_is_what_must_be_read(monkeypatch):
    # Llama 3.1 8B: 7.505e9 numbers are multiplied (8.03e9 less the embedding), a token
    # has 2 x 32 x 8 x 128 numbers in the cache. 16 sequences of 100 tokens after 100,
    # decoded 8 at a time: 200 steps; a token sees 150 others on average.
    monkeypatch.setattr(rollout.jax, "device_count", lambda: 1)
    monkeypatch.setattr(rollout.hardware, "facts", lambda kind: (1, 4.8e12, 1))
    monkeypatch.setattr(rollout.hardware, "peak_flops", lambda kind: 989e12)
    request = Request(
        prompt_id=0, tokens=(0,) * 100, num_samples=16, seed=0,
        sampling=Sampling(max_tokens=100),
    )  # fmt: skip
    expected = 2 * (200 * 7.505e9 + 1600 * 150 * 65536) / 4.8e12
    expected += 2 * 7.505e9 * 100 / 989e12
    found = rollout.floor(shapes.find("llama3.1-8b"), [request], 8, 2, 2, 1)
    assert found == pytest.approx(expected, rel=1e-3)
    # With 8 bits the 32 layers' 6.979e9 have a byte, the output matrix keeps two.
    less = (200 * 6.979e9 + 1600 * 150 * 65536) / 4.8e12
    found = rollout.floor(shapes.find("llama3.1-8b"), [request], 8, 1, 1, 1)
    assert found == pytest.approx(expected - less, rel=1e-3)


@pytest.mark.slow
def test_every_way_of_resharding_is_charged_the_same_bytes(measured):
    lines = measured(
        "reshard", "--model", "tiny", "--tensor", "2", "--chunk-mib", "1", "64",
        "--steps", "1",
    )  # fmt: skip
    ways = {}
    for line in lines:
        ways.setdefault(line["way"], []).append(line)
    moving = ["reshard, 1 MiB", "reshard, 64 MiB"]
    assert {way: [line["by"] for line in found] for way, found in ways.items()} == {
        "fsdp-to-tensor": [*moving, "jit", "device_put"],
        "trainer-to-engine": moving,
        "half-to-half": [*moving, "device_put"],
    }
    for found in ways.values():
        assert len({line["bytes"] for line in found}) == 1
        for line in found:
            rate = line["bytes"] / line["seconds"] / 1e9
            assert line["gb_per_second"] == pytest.approx(rate)
    # 64 x (512 + 1) weights outside layers; two layers of 2 norms, 64 x 64 queries and
    # outputs, 64 x 32 keys and values and 3 matrices of 64 x 128. Norms are everywhere;
    # of all others each device of the second half gets a quarter.
    count = 64 * 513 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert ways["half-to-half"][0]["bytes"] == pytest.approx(2 * count / 4, rel=0.01)


@pytest.mark.slow
def test_kernels_of_experts_compute_the_same(measured):
    lines = measured(
        "moe", "--tokens", "24", "--width", "8", "--expert-size", "8",
        "--num-experts", "4", "--top-k", "2", "--dtype", "float32", "--steps", "1",
        "--skew", "skewed", "one",
    )  # fmt: skip
    found = {(line["kernel"], line["skew"]): line for line in lines}
    kernels = ("dense", "blocked", "ragged", "triton", "mosaic")
    assert set(found) == set(itertools.product(kernels, ("skewed", "one")))
    for (kernel, _), line in found.items():
        if kernel in ("triton", "mosaic"):  # of GPUs
            assert line["failed"]
        elif kernel != "dense":
            assert line["error"] < 1e-5 and line["seconds"] > 0


def test_an_unknown_measurement_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError,
        match="one of episodes, moe, reshard, .*, step, train; got 'speed'",
    ):
        bench.main(["speed"])
    with pytest.raises(ValueError, match="got nothing"):
        bench.main([])


def test_sequences_that_form_no_groups_are_refused():
    with pytest.raises(ValueError, match="sequences must be a multiple of 8, got 9"):
        bench.main(["train", "--sequences", "9"])


@pytest.mark.parametrize(
    "name, where, options, proposed",
    [
        (
            "train", (train, "_measure"), ["--micro-batch-size", "16", "--fsdp", "8"],
            ["--micro-batch-size 8 (now 16)", "--remat full", "--fsdp 16"],
        ),
        (
            "train", (train, "random_actor"), ["--fsdp", "8"],
            ["--sequences 16 (now 32)"],
        ),
        (
            "step", (step, "run"), ["--micro-batch-size", "8"],
            ["--micro-batch-size 4 (now 8)", "--remat full", "--max-num-seqs 256"],
        ),
        (
            "rollout", (rollout, "_measure"), [],
            ["--trained-dtype bfloat16", "--quantization int8", "--max-num-seqs 128"],
        ),
        ("reshard", (reshard, "_compare"), [], ["--chunk-mib 512 (now 1024 4096)"]),
    ],
)  # fmt: skip
def test_a_lack_of_memory_names_options_that_need_less(
    capsys, monkeypatch, name, where, options, proposed
):
    def lacking(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 39.15GiB with "
            "allocator GPU_0_bfc on device 0. [executable_name='jit_update']"
        )

    monkeypatch.setattr(*where, lacking)
    assert cli.main(["bench", name, "--model", "tiny", *options]) == 2
    said = capsys.readouterr().err
    assert "out of memory: the update wanted 39.15 GiB in one piece on " in said
    for option in proposed:
        assert f"\n  {option}" in said


@pytest.mark.slow
def test_conversations_are_measured_three_ways(measured):
    kept, reread, waiting = measured(
        "episodes", "--model", "tiny", "--dtype", "float32", "--episodes", "6",
        "--turns", "3", "--prompt-length", "200", "--length", "16",
        "--answer-length", "8", "--seconds", "0.1", "--rounds", "1",
        "--max-num-seqs", "8",
    )  # fmt: skip
    assert [kept["variant"], reread["variant"]] == ["kept", "reread"]
    # What is behind the last whole page of 64 is read again at most.
    assert kept["prefilled"] < 200 + 2 * (64 + 16 + 8)
    assert reread["prefilled"] > 3 * 200
    assert waiting["prefilled"] == kept["prefilled"]
    assert waiting["seconds"] > waiting["longest"] > 0
