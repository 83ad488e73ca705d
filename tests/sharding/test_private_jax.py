"""What of JAX's private parts this package needs, and that nothing else is used."""

import ast
import inspect
import pathlib

import jax

from jaxrl_llm.sharding import private_jax

ROOT = pathlib.Path(__file__).parents[2]
ONLY = ROOT / "sharding" / "private_jax.py"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_one_file_imports_what_jax_keeps_private():
    files = [*ROOT.glob("jaxrl_llm/**/*.py"), *ROOT.glob("sharding/**/*.py")]
    private = ("jax._src", "jaxlib._jax", "jaxlib.xla_extension")
    users = {
        path.resolve()
        for path in files
        for name in imported(path)
        if name.startswith(private)
    }
    assert users == {ONLY}


def test_a_backend_has_started_once_there_are_devices():
    assert jax.devices() and private_jax.backend_has_started()


def test_a_process_alone_has_no_coordination_client():
    assert jax.process_count() == 1
    assert private_jax.coordination_client() is None


def test_a_service_starts_and_ends():
    service = private_jax.coordination_service("[::]:0", 1, heartbeat_timeout_s=60)
    service.shutdown()


def test_clusters_are_asked_for_what_is_not_given_only(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    given = ("127.0.0.1:1234", 2, 1)
    assert private_jax.detect_cluster(*given, timeout_s=1)[:3] == given


def test_attention_takes_offsets_of_packed_sequences():
    cudnn = private_jax.cudnn_attention()
    taken = inspect.signature(cudnn.dot_product_attention).parameters
    for name in (
        "q_seqlen",
        "kv_seqlen",
        "q_offsets",
        "kv_offsets",
        "scale",
        "mask_type",
        "sliding_window_length",
    ):
        assert name in taken
    assert {"CAUSAL", "PADDING_CAUSAL"} <= set(cudnn.MaskType.__members__)
