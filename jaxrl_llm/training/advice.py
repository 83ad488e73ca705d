"""What to change, where the metrics of a step say that something should be."""

from collections.abc import Mapping

from jaxrl_llm.config.schema import Config


def on_mismatch(config: Config, metrics: Mapping[str, float]) -> str | None:
    """What to change when sampler and trainer differ by more than they should."""
    found = metrics.get("mismatch/logprob_diff_mean", 0.0)
    if config.algorithm.rollout_correction or not found > config.rollout.max_mismatch:
        return None
    return (
        f"sampler and trainer differ by {found:.3g} nats per token "
        "(mismatch/logprob_diff_mean), over rollout.max_mismatch "
        f"{config.rollout.max_mismatch}: --algorithm.rollout_correction.rollout_is "
        "token corrects for it"
    )
