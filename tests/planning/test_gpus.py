"""Plans for NVIDIA GPUs on a machine that has none; needs their compiler only."""

import importlib.util

import pytest

from jaxrl_llm import cli as launch
from jaxrl_llm.planning import gpus, planner
from jaxrl_llm.sharding import hardware, private_jax

PLUGIN = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(
    "jax_plugins.xla_cuda13"
)
compiler = pytest.mark.skipif(not PLUGIN, reason="needs the compiler of jax[cuda13]")


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:0", "h200:2x", "h100:2x2x2"])
def test_a_topology_is_kind_and_count(name, capsys):
    assert launch.main(["plan", "quickstart", "--topology", name]) == 2
    said = capsys.readouterr().err
    assert f"--topology {name}: GPUs are KIND:COUNT or KIND:HOSTSxCOUNT" in said
    assert "kinds: h100, h200" in said


@pytest.mark.skipif(bool(PLUGIN), reason="the compiler is installed")
def test_without_the_compiler_one_line_says_what_to_install(capsys):
    assert launch.main(["plan", "quickstart", "--topology", "h100:8"]) == 2
    assert "pip install 'jaxrl-llm[cuda]'" in capsys.readouterr().err


def test_one_host_of_several_is_a_topology_too():
    assert gpus.host_of("h100:4x8") == "h100:8" == gpus.host_of("h100:8")


@pytest.mark.parametrize("kind", gpus.KINDS)
def test_a_kind_is_what_the_data_sheets_say(kind):
    gib, _, _ = hardware.facts(gpus.KINDS[kind])
    assert f"device_memory_size: {int(gib * 2**30)}\n" in gpus.described(kind)
    assert hardware.peak_flops(gpus.KINDS[kind])
    # A run gets as much of it as JAX's pool.
    assert gpus.usable_bytes(f"{kind}:8") == int(gib * 2**30 * 0.92)


def test_attention_is_built_for_the_gpu_that_is_planned_for():
    cudnn = private_jax.cudnn_attention()
    assert not cudnn.check_compute_capability("9.0")  # here are CPUs
    with private_jax.cudnn_capability((9, 0)):
        assert cudnn.check_compute_capability("9.0")
        assert not cudnn.check_compute_capability("10.0")
        assert cudnn.is_cuda_compute_capability_equal("9.0")
    assert not cudnn.check_compute_capability("9.0")


@compiler
def test_gpus_of_two_hosts_have_two_processes():
    found, usable = planner.elsewhere("h100:2x4")
    assert [d.process_index for d in found] == [0] * 4 + [1] * 4
    assert {(d.platform, d.device_kind) for d in found} == {
        ("gpu", "NVIDIA H100 80GB HBM3")
    }
    assert usable < hardware.facts(found[0].device_kind)[0] * 2**30
    assert len(planner.host_of("h100:2x4")) == 4


@compiler
@pytest.mark.slow
def test_every_program_of_a_run_compiles_for_gpus_that_are_not_here(capsys):
    options = ["--model.path", "smollm2-135m", "--actor.micro_batch_size", "128"]
    plan = ["plan", "quickstart_1gpu", "--topology", "h100:2x2", *options]
    assert launch.main(plan) == 0
    shown = capsys.readouterr().out
    assert "4 x NVIDIA H100 80GB HBM3" in shown and "\nfits" in shown
    for name in ("update", "prefill", "decode", "reshard"):
        assert f"+ {name} " in shown
