"""How tests lie: each file stands alone, what several need is in tests/support;
and what is annotated is checked."""

import pathlib
import re

import beartype
import jax.numpy as jnp
import jaxtyping
import kept_programs
import pytest
from jaxtyping import Array, Float

from jaxrl_llm.algorithms import masked

HERE = pathlib.Path(__file__).parent
FILES = sorted(HERE.glob("**/*.py"))
TESTS = [path.stem for path in FILES if path.name.startswith("test_")]
# Read from the text, so that the programs that tests start count too.
IMPORT = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)


def test_nothing_imports_a_test():
    for path in FILES:
        for name in IMPORT.findall(path.read_text()):
            found = set(TESTS) & set(name.split("."))
            assert not found, f"{path.name}: move what it uses of {name} to support"


@jaxtyping.jaxtyped(typechecker=beartype.beartype)
def turned(x: Float[Array, "R T"]) -> Float[Array, "R T"]:
    return x.T


def test_shapes_that_do_not_fit_their_annotations_are_refused():
    mask, more = jnp.ones((2, 3), bool), jnp.zeros((2, 4), jnp.int32)
    masked.sequence_sum(1.0 * mask, mask, 0 * more[:, :3], 1)
    with pytest.raises(Exception, match="(?s)sequence_ids=.* violates type hint"):
        masked.sequence_sum(1.0 * mask, mask, more, 1)
    turned(jnp.ones((2, 2)))
    with pytest.raises(Exception, match="(?s)return.* violates type hint"):
        turned(jnp.ones((2, 3)))


def test_compiled_programs_are_kept_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_programs, "KEPT", tmp_path / "build/compiled")
    monkeypatch.setattr(kept_programs, "runs", [])
    one = pathlib.Path(kept_programs.begin())
    (one / "program").write_bytes(b"compiled")
    kept_programs.keep()
    kept_programs.runs.pop().cleanup()
    other = pathlib.Path(kept_programs.begin())
    assert (other / "program").read_bytes() == b"compiled"
    kept_programs.runs.pop().cleanup()
    monkeypatch.setattr(kept_programs, "MOST_BYTES", 7)
    assert not list(pathlib.Path(kept_programs.begin()).iterdir())
    kept_programs.runs.pop().cleanup()
