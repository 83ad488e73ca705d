"""What Prometheus reads."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from jaxrl_llm.serving.worker import State


class Metrics:
    """Counts of one server.

    Args:
      state: what there is to do at the moment.
    """

    def __init__(self, state: Callable[[], State]):
        self._registry = CollectorRegistry()
        kept = {"registry": self._registry}
        for name, what, value in (
            ("queued", "responses that wait or are generated", lambda s: s.queued),
            ("paused", "1 while nothing is begun", lambda s: float(s.paused)),
            ("weight_version", "of the weights", lambda s: s.weight_version),
        ):
            gauge = Gauge(f"jaxrl_{name}", what, **kept)
            gauge.set_function(lambda value=value: value(state()))
        self.prompt_tokens = Counter("jaxrl_prompt_tokens", "read", **kept)
        self.generation_tokens = Counter("jaxrl_generation_tokens", "sampled", **kept)
        self.responses = Counter(
            "jaxrl_responses", "completed, by what ended them", ["reason"], **kept
        )
        self.aborted = Counter(
            "jaxrl_aborted", "responses that nobody waited for any more", **kept
        )
        self.refused = Counter(
            "jaxrl_refused", "requests, by status of HTTP", ["status"], **kept
        )
        self.seconds = Histogram(
            "jaxrl_request_seconds",
            "from a request to the end of its answer",
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
            **kept,
        )

    def text(self) -> bytes:
        """The page that is read."""
        return generate_latest(self._registry)
