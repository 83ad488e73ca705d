import gc

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.tracking import performance
from jaxrl_llm.tracking.performance import Timer, long_lived_objects_set_aside


def is_walked(x):
    """Whether a collection looks at x; no loop in Python, there are millions."""
    return id(x) in map(id, gc.get_objects())


def test_what_lasts_is_walked_by_no_collection():
    """Objects from before are the collector's again afterwards, later ones always."""
    gc.unfreeze()  # what was there before this test
    lasting = [[] for _ in range(1000)]
    before = gc.get_freeze_count()
    with long_lived_objects_set_aside() as set_aside:
        assert gc.get_freeze_count() == before
        set_aside()
        assert gc.get_freeze_count() > before + len(lasting)
        assert not is_walked(lasting[0])
        frozen, later = gc.get_freeze_count(), [[]]
        set_aside()
        assert gc.get_freeze_count() <= frozen  # less what has gone since
        assert is_walked(later[0])
    assert gc.get_freeze_count() == 0
    assert is_walked(lasting[0])


def test_compilations_are_counted_and_in_no_other_phase():
    x = jnp.arange(7.0)

    @jax.jit
    def new(x):
        return jnp.sin(x) * 3.25 + x

    timer = Timer()
    with timer("gen"):
        new(x).block_until_ready()
    first = timer.metrics()
    assert first["perf/compilations"] == 1
    parts = first["timing_s/gen"] + first["timing_s/compile"]
    assert 0 < first["timing_s/compile"] < parts <= first["timing_s/step"]
    again = Timer()
    with again("gen"):
        new(x).block_until_ready()
    assert again.metrics()["perf/compilations"] == 0
    assert "timing_s/compile" not in again.metrics()


def test_programs_compiled_side_by_side_take_their_time_once(monkeypatch):
    monkeypatch.setattr(
        performance,
        "_compiled",
        [
            (1.0, 4.0, False),
            (2.0, 3.0, False),
            (3.5, 5.0, False),
            (7.0, 9.0, False),
            (0.0, 10.0, True),
        ],
    )
    assert performance.compile_seconds(0.0, 10.0) == pytest.approx(6.0)
    assert performance.compile_seconds(2.5, 8.0) == pytest.approx(3.5)
    assert performance.compile_seconds(5.0, 7.0) == 0.0
