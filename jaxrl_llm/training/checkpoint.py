"""Where a run can go on: asynchronous, atomic checkpoints of everything that changes.

Weights, optimizer and step are arrays, saved and restored in their sharding; the data
position and coefficients are JSON. A checkpoint that was not finished does not exist:
orbax writes under a temporary name and renames.

Each says its format's number, `FORMAT`; those from before there was one count as 0.
Formats 0 and 1 differ in nothing else.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxrl_llm import models
from jaxrl_llm.config.schema import TrainerConfig
from jaxrl_llm.sharding import processes

FORMAT = 1
"""The format of checkpoints written now; older ones can be read."""


class Checkpoint(NamedTuple):
    """A point to go on from."""

    step: int
    state: Any
    """A tree of arrays."""
    position: dict[str, Any]
    """What is not an array: data position, coefficients."""


def due(trainer: TrainerConfig, step: int, stopping: bool) -> bool:
    """Whether a checkpoint is to be saved after this step; the last one always is."""
    if step == trainer.total_training_steps or stopping:
        return True
    return trainer.save_freq > 0 and step % trainer.save_freq == 0


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made if it does not exist.
      max_to_keep: the newest so many stay, and the one with the highest score besides.
    """

    def __init__(self, directory: str | Path, max_to_keep: int):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,  # without it, orbax would not write the scores down
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(max_to_keep),
                        policies.BestN(
                            get_metric_fn=_score,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        score: float | None = None,
    ) -> None:
        """Copies `state` off the device and writes it in the background.

        `state` may be donated as soon as this returns. Saving a step that is already
        saved does nothing.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)),
                position=ocp.args.JsonSave({**position, "format": FORMAT}),
            ),
            metrics=None if score is None else {"score": score},
        )

    def restore(self, like: Any) -> Checkpoint | None:
        """The newest checkpoint, or None if there is none.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: what `state` was, laid
            out as it is wanted now.

        Raises:
          ValueError: the newest checkpoint holds other arrays than `like`, or is of a
            newer format than `FORMAT`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        position = self._position(step)
        wanted = _named(like)
        saved = self._manager.item_metadata(step)["state"].tree
        for name in sorted(wanted.keys() | saved.keys()):
            if name not in saved or name not in wanted:
                where = "checkpoint" if name not in saved else "configuration"
                raise ValueError(self._stranger(step, f"the {where} has no {name}"))
            if tuple(saved[name].shape) != wanted[name].shape:
                shapes = f"{tuple(saved[name].shape)}, not {wanted[name].shape}"
                raise ValueError(self._stranger(step, f"{name} is {shapes}"))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)),
        )
        state = jax.tree.unflatten(
            jax.tree.structure(like), [restored["state"][name] for name in wanted]
        )
        return Checkpoint(step, state, position)

    def _position(self, step: int) -> dict[str, Any]:
        """What is stored besides arrays, of a format that is known."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        position = dict(self._manager.restore(step, args=args)["position"])
        number = position.pop("format", 0)
        if number > FORMAT:
            raise ValueError(
                f"{self.directory / str(step)} has checkpoint format {number}, this "
                f"version reads up to {FORMAT}; go on with a newer jaxrl_llm, or use "
                "another output_dir"
            )
        return position

    def _stranger(self, step: int, what: str) -> str:
        return (
            f"{self.directory / str(step)} is a checkpoint of another model or "
            f"optimizer: {what}; use another output_dir, or trainer.resume: never"
        )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits, then ends the background threads."""
        self._manager.close()


def save_weights(
    run_directory: str | Path, source: models.Checkpoint, params: Any
) -> None:
    """Writes the policy as a Hugging Face directory, in place of an older one. All
    processes call it.

    Args:
      source: what was trained; says the architecture and the tokenizer.
    """
    directory = Path(run_directory, "huggingface")
    fresh = directory.with_name("huggingface.new")
    if processes.leads():
        shutil.rmtree(fresh, ignore_errors=True)
    processes.gather(None)
    models.save(fresh, source.arch, params, source.tokenizer)
    if processes.leads():
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
