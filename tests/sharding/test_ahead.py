import threading

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.sharding.ahead import Ahead


def test_what_was_compiled_ahead_is_not_compiled_when_it_is_called():
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape)
        return 2 * x

    shapes = {n: jax.ShapeDtypeStruct((n,), jnp.float32) for n in (3, 4)}
    told = []
    with Ahead({str(n): lambda x=x: double.lower(x) for n, x in shapes.items()}) as it:
        found = it.wait(lambda done, count: told.append((done, count)))
    assert list(found) == ["3", "4"]
    assert told[-1] == (2, 2) == (it.count, 2)
    assert sorted(traced) == [(3,), (4,)]
    for n in shapes:
        assert double(jnp.ones(n, jnp.float32)).tolist() == [2.0] * n
    assert len(traced) == 2


def test_an_error_of_one_is_raised_where_all_are_waited_for():
    def fail():
        raise ValueError("no such program")

    with pytest.raises(ValueError, match="no such program"), Ahead({"one": fail}) as it:
        it.wait()


def test_who_is_interrupted_does_not_wait():
    begun, may_end = threading.Event(), threading.Event()

    def slow():
        begun.set()
        may_end.wait()
        raise ValueError("nobody hears it")

    with pytest.raises(KeyboardInterrupt), Ahead({"slow": slow}):
        begun.wait()
        raise KeyboardInterrupt
    may_end.set()
