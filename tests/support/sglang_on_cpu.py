"""The engine `sglang` with a server of its own on this machine's CPU."""

import pathlib

from jaxrl_llm.rollout.servers.sglang import SglangEngine, SglangSettings

HERE = pathlib.Path(__file__).parents[2] / ".venv-sglang"
ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
    "--cuda-graph-backend-decode=disabled",
    "--cuda-graph-backend-prefill=disabled",
    *("--mem-fraction-static", "0.1", "--max-total-tokens", "4096"),
    "--skip-server-warmup",
)
ENVIRONMENT = {
    "LD_LIBRARY_PATH": str(HERE / "stub"),
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def make(loaded, prompts, directory, max_model_len=128, **sglang):
    """An engine; `sglang` are fields of `SglangSettings`."""
    given = {
        "command": [str(HERE / "bin/python"), "-m", "sglang.launch_server"],
        "args": ARGS,
        "env": ENVIRONMENT,
    }
    return SglangEngine(
        loaded.arch,
        loaded.tokenizer,
        prompts,
        SglangSettings(**(sglang if "urls" in sglang else given | sglang)),
        directory=directory,
        dtype="float32",
        max_model_len=max_model_len,
        max_num_seqs=16,
    )
