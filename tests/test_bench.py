import json
import math

import pytest

from jaxrl_llm import bench


@pytest.fixture
def measured(capsys):
    """Runs a measurement; the figures that it prints, one per variant."""

    def run(*arguments):
        bench.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    return run


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
        "FSDP to tensor-2": [*moving, "jit", "device_put"],
        "trainer to engine": moving,
        "half to half": [*moving, "device_put"],
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
    assert ways["half to half"][0]["bytes"] == pytest.approx(2 * count / 4, rel=0.01)


def test_an_unknown_measurement_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="one of reshard, rollout, step, train; got 'speed'"
    ):
        bench.main(["speed"])
    with pytest.raises(ValueError, match="got nothing"):
        bench.main([])


def test_sequences_that_form_no_groups_are_refused():
    with pytest.raises(ValueError, match="sequences must be a multiple of 8, got 9"):
        bench.main(["train", "--sequences", "9"])
