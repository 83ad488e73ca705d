"""What JAX tells of its work while a test runs."""

import contextlib

import jax


@contextlib.contextmanager
def told(ending):
    """Functions' names, None where there is none, of the events within the block whose
    names end so."""
    names = []

    def listen(event, seconds, *, fun_name=None, **_):
        if event.endswith(ending):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
