"""Where a run can go on: asynchronous, atomic checkpoints of everything that changes.

Weights, optimizer and step are arrays, saved and restored in their sharding; the data
position and coefficients are JSON. A checkpoint that was not finished does not exist:
orbax writes under a temporary name and renames.

Storage changes bits, loses files and cuts them short. So a checkpoint carries a
checksum of every array, of its values, so that it is the same in any sharding, and a
digest of what is JSON. Only one that agrees with both is gone on from; else the one
before.

Each says its format's number, `FORMAT`. Formats 0 (without a number) and 1 have no
checksums and differ in nothing else.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxrl_llm import models
from jaxrl_llm.config.schema import LoopConfig
from jaxrl_llm.sharding import checksum, processes
from jaxrl_llm.sharding.out_of_memory import shortage

ADAPTER = "adapter"
"""The folder of a run that has its adapters, as PEFT keeps them."""
FORMAT = 2
"""The format of checkpoints written now; older ones can be read."""

Say = Callable[[str], None]


class CheckpointError(ValueError):
    """There are checkpoints, but none that can be gone on from; nothing was changed."""


class Checkpoint(NamedTuple):
    """A point to go on from."""

    step: int
    state: Any
    """A tree of arrays."""
    position: dict[str, Any]
    """What is not an array: data position, coefficients."""


def due(trainer: LoopConfig, step: int, stopping: bool) -> bool:
    """Whether a checkpoint is to be saved after this step; the last one always is."""
    if step == trainer.total_training_steps or stopping:
        return True
    return trainer.save_freq > 0 and step % trainer.save_freq == 0


def steps_in(directory: Path) -> list[int]:
    """Steps that have a checkpoint in `directory`, be it a damaged one, oldest
    first."""
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def check_room(directory: Path, state: Any) -> None:
    """Raises OSError if the disk has no room for a checkpoint of `state`, a tree of
    arrays or their shapes. All processes call it."""
    leaves = jax.tree.leaves(state)
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    free = min(processes.gather(shutil.disk_usage(directory).free))
    if free < needed:
        raise OSError(
            f"{directory}: a checkpoint takes {needed / 1e9:.2f} GB, but only "
            f"{free / 1e9:.2f} GB are free; make room, or use another output_dir"
        )


def none_up_to(step: int | None, directory: Path, there: Sequence[int]) -> str:
    """What to do where a run is not whole up to any checkpoint."""
    return (
        f"what the run wrote is whole up to step {step}, but {directory} has "
        f"checkpoints of steps {list(there)} only. Nothing was changed: put back what "
        "is missing, choose another output_dir, or set trainer.resume=force to go on "
        "from the newest without it"
    )


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made if it does not exist.
      max_to_keep: the newest so many stay, and the one with the highest score besides.
    """

    def __init__(self, directory: str | Path, max_to_keep: int):
        _print_no_traces()
        self._reserving: threading.Thread | None = None
        self.directory = Path(directory).absolute()
        self._scores = {step: _score(self.directory / str(step)) for step in self.steps}
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "position": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Newest(max_to_keep, self._scores),
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # reads no file that may be damaged
            ),
        )

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, be it a damaged one, oldest first."""
        return steps_in(self.directory)

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

        Raises:
          OSError: this one or the one before could not be written.
        """
        if step in self._manager.all_steps():
            return
        named = _named(state)
        said = {**position, "format": FORMAT, "score": score, "arrays": _facts(named)}
        self._scores[step] = score
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(named),
                    position=ocp.args.JsonSave({**said, "sha256": _digest(said)}),
                ),
            )

    def restore(
        self, like: Any, *, up_to: int | None = None, say: Say = print
    ) -> Checkpoint | None:
        """The newest checkpoint that is as it was saved, or None if there is none at
        all. Those newer than that are set aside under other names.

        All processes of a run call it, and get the same one.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: what `state` was, laid
            out as it is wanted now.
          up_to: none of a later step.
          say: is told, in a line each, of checkpoints that are damaged or cannot tell.

        Raises:
          CheckpointError: there are checkpoints up to that step, but all are damaged.
          ValueError: the newest sound one holds other arrays than `like`, or is of a
            newer format than `FORMAT`.
        """
        there = max(processes.gather(self.steps), key=len)
        causes = []
        for step in reversed([s for s in there if up_to is None or s <= up_to]):
            found = self._restore(step, like, say)
            if isinstance(found, Checkpoint):
                for cause in causes:
                    say(f"{cause}; going on from checkpoint {step}, the one before")
                self._set_aside([s for s in there if s > step])
                return found
            causes.append(f"{self.directory / str(step)} is damaged: {found}")
        if not there:
            return None
        if not causes:
            raise CheckpointError(none_up_to(up_to, self.directory, there))
        raise CheckpointError(
            f"no checkpoint can be gone on from: {'; '.join(causes)}. Nothing was "
            "changed: put a sound copy back, or choose another output_dir"
        )

    def check_room(self, state: Any) -> None:
        """Raises OSError if the disk has no room for a checkpoint of `state`, a tree of
        arrays or their shapes. All processes call it."""
        check_room(self.directory, state)

    def reserve(self, state: Any) -> None:
        """Has the host's memory that copies of such arrays will take made ready in the
        background. GPUs copy to memory that the system has pinned, which takes a second
        for some gigabytes the first time: nobody then waits for that in `save`."""
        if jax.default_backend() != "gpu" or self._reserving is not None:
            return
        share = [x.nbytes // jax.process_count() for x in jax.tree.leaves(state)]
        self._reserving = threading.Thread(
            target=_pin, args=(share,), name="pin", daemon=True
        )
        self._reserving.start()

    def _restore(self, step: int, like: Any, say: Say) -> Checkpoint | str:
        """The checkpoint of a step, or how it is damaged; the same in all processes."""
        path, wanted = self.directory / str(step), _named(like)
        position, damage = _agreed(functools.partial(_read_position, path))
        if damage:
            return damage
        saved = known = position.pop("arrays", None)
        if known is None:
            saved, damage = _agreed(functools.partial(_shapes, path))
            if damage:
                return damage
        for name in sorted(wanted.keys() | saved.keys()):
            if name not in saved or name not in wanted:
                where = "checkpoint" if name not in saved else "configuration"
                raise ValueError(self._stranger(step, f"the {where} has no {name}"))
            for what in ("shape", "dtype"):
                was, now = saved[name][what], _fact(wanted[name])[what]
                if was not in (None, now):
                    said = f"{name} has {what} {was}, not {now}"
                    raise ValueError(self._stranger(step, said))
        state, damage = _agreed(functools.partial(_read_state, path, wanted))
        if damage:
            return damage
        if known is None:
            say(
                f"{path} was written by an earlier version and carries no checksums: "
                "whether it is as it was saved cannot be said"
            )
        else:
            sums = _checksums(state)
            differ = [name for name in state if sums[name] != known[name]["checksum"]]
            if differ:
                more = f" and {len(differ) - 1} more" if differ[1:] else ""
                return f"the values of {differ[0]}{more} are not those that were saved"
        leaves = [state[name] for name in wanted]
        for ours in ("format", "score", "sha256"):
            position.pop(ours, None)
        return Checkpoint(
            step, jax.tree.unflatten(jax.tree.structure(like), leaves), position
        )

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Gives checkpoints names that are nobody's, so that their steps are free."""
        if not steps:
            return
        if processes.leads():
            for step in steps:
                path, number = self.directory / str(step), 0
                aside = path.with_name(f"{step}.aside")
                while aside.exists():
                    number += 1
                    aside = path.with_name(f"{step}.aside{number}")
                path.rename(aside)
        processes.gather(None)
        self._manager.reload()

    def _stranger(self, step: int, what: str) -> str:
        return (
            f"{self.directory / str(step)} is a checkpoint of another model or "
            f"optimizer: {what}; use another output_dir, or trainer.resume: never"
        )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
          OSError: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in a line what could not be written, here or in the background."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if shortage(error):
                raise  # of a device's memory, not of the disk's
            full = os.strerror(errno.ENOSPC)
            cause = full if full in str(error) else str(error).splitlines()[0][:300]
            whole = self.steps
            goes_on = f"after step {whole[-1]}" if whole else "at the beginning"
            raise OSError(
                f"{self.directory}: a checkpoint could not be written: {cause}; when "
                f"that is mended, the same command goes on {goes_on}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits, then ends the background threads."""
        try:
            with self._writing():
                self._manager.close()
        except OSError:
            if kind is None:  # else an error is on its way already
                raise


def _pin(sizes: Sequence[int]) -> None:
    """Takes pinned memory of so many bytes each, which JAX keeps when it is let go."""
    pinned = jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0], memory_kind="pinned_host"
    )
    # Where there is not enough, the save says so.
    with contextlib.suppress(RuntimeError, MemoryError):
        held = [jax.device_put(np.zeros(size, np.uint8), pinned) for size in sizes]
        jax.block_until_ready(held)


class _Newest(policies.PreservationPolicy):
    """Keeps the newest checkpoints, and the best: of equally good ones the newest."""

    def __init__(self, count: int, scores: Mapping[int, float | None]):
        self._count, self._scores = count, scores

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """One answer for each of the checkpoints."""
        steps = sorted(info.step for info in checkpoints)
        kept = set(steps[-self._count :])
        scored = {s: x for s in steps if (x := self._scores.get(s)) is not None}
        if scored:
            kept.add(max(scored, key=lambda step: (scored[step], step)))
        return [info.step in kept for info in checkpoints]


def _agreed(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `read` returns here, and the damage that it has met in any process."""
    result, damage = None, None
    try:
        result = read()
    except _NewerFormat:
        raise
    except ValueError as error:
        damage = str(error)
    except Exception as error:  # noqa: BLE001 - what is damaged raises anything
        if shortage(error):
            raise  # that of a device says nothing of the file
        damage = f"{type(error).__name__}: {error}"
    found = [one for one in processes.gather(damage) if one is not None]
    return result, (found[0].strip().splitlines() or ["?"])[0][:300] if found else None


class _NewerFormat(ValueError):
    """A checkpoint that a later version wrote."""


def _read_position(path: Path) -> dict[str, Any]:
    """What is stored besides arrays, as it was stored, of a format that is known."""
    file = path / "position" / "metadata"
    try:
        position = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(position, dict):
        raise ValueError(f"{file} holds no mapping")
    number, digest = position.get("format", 0), position.pop("sha256", None)
    without = digest is None and number in (0, 1)
    if not without and digest != _digest(position):
        raise ValueError(f"{file} is not what was written: its digest differs")
    if number > FORMAT:
        raise _NewerFormat(
            f"{path} has checkpoint format {number}, this version reads up to "
            f"{FORMAT}; go on with a newer jaxrl_llm, or use another output_dir"
        )
    return position


def _read_state(path: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays, by name, laid out as they are wanted."""
    handler = ocp.StandardCheckpointHandler()
    try:
        found = handler.restore(
            path / "state", args=ocp.args.StandardRestore(dict(wanted))
        )
        return dict(jax.block_until_ready(found))
    finally:
        handler.close()


def read_policy(path: str | Path, like: Any) -> Any:
    """The policy's parameters in one checkpoint of a run, if they are as they were
    saved. All processes call it.

    Args:
      path: RUN/checkpoints/STEP.
      like: a tree of `jax.ShapeDtypeStruct` with shardings: the parameters that are
        trained, laid out as they are wanted.

    Raises:
      CheckpointError: there is no such checkpoint, it is damaged, or it is of another
        model.
    """
    path = Path(path).absolute()
    position, damage = _agreed(functools.partial(_read_position, path))
    known = {} if damage else position.get("arrays") or {}
    # A run that learned from rows that are there has nothing but the policy.
    alone = any(name.startswith("params.") for name in known)
    prefix = "params" if alone else "actor.params"
    wanted = {f"{prefix}.{name}": leaf for name, leaf in _named(like).items()}
    differ = [
        f"{name} has shape {known[name]['shape']}, not {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name in known and known[name]["shape"] != list(leaf.shape)
    ]
    if known:
        differ += [f"it has no {name}" for name in wanted if name not in known]
    if differ:
        raise CheckpointError(f"{path} is a checkpoint of another model: {differ[0]}")
    if not damage:
        state, damage = _agreed(functools.partial(_read_part, path, wanted))
    if not damage and known:
        sums = _checksums(state)
        wrong = [name for name in state if sums[name] != known[name]["checksum"]]
        if wrong:
            damage = f"the values of {wrong[0]} are not those that were saved"
    if damage:
        raise CheckpointError(f"{path} is damaged: {damage}")
    return jax.tree.unflatten(
        jax.tree.structure(like), [state[name] for name in wanted]
    )


def _read_part(path: Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Some of the arrays, by name, laid out as they are wanted."""
    handler = ocp.PyTreeCheckpointHandler()
    how = ocp.checkpoint_utils.construct_restore_args(dict(wanted))
    try:
        found = handler.restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                item=dict(wanted), restore_args=how, partial_restore=True
            ),
        )
        return dict(jax.block_until_ready(found))
    finally:
        handler.close()


def _print_no_traces() -> None:
    """What cannot be read or written is raised, and that is enough: orbax logs it with
    a trace too, and as its event loop then ends, asyncio and TensorStore print one for
    every other array that is under way."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_is_no_array)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _is_no_array(record: logging.LogRecord) -> bool:
    text, (_, error, _) = record.getMessage(), record.exc_info or (None,) * 3
    of_a_file = isinstance(error, OSError) or "Error writing" in text
    return not ("never retrieved" in text and of_a_file)


def _unraisable(report: Callable[[Any], None], unraisable: Any) -> None:
    error = unraisable.exc_value
    closed = isinstance(error, RuntimeError) and "loop is closed" in str(error)
    if not (closed or "error while reading array" in str(error)):
        report(unraisable)


def _shapes(path: Path) -> dict[str, Any]:
    """What a checkpoint without checksums says of its arrays."""
    handler = ocp.StandardCheckpointHandler()
    try:
        saved = handler.metadata(path / "state").tree
    finally:
        handler.close()
    return {name: {"shape": list(x.shape), "dtype": None} for name, x in saved.items()}


def _score(path: Path) -> float | None:
    """The score of a checkpoint, if it has one that can be read."""
    for file in (path / "position" / "metadata", path / "metrics" / "metrics"):
        try:
            said = json.loads(file.read_bytes())
            digest = said.pop("sha256", None)
            if digest in (None, _digest(said)) and said.get("score") is not None:
                return float(said["score"])
        except (OSError, ValueError, TypeError, AttributeError):
            pass
    return None


def _digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _facts(named: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of arrays, as JSON."""
    sums = _checksums(named)
    return {
        name: {**_fact(array), "checksum": sums[name]} for name, array in named.items()
    }


def _fact(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def programs(like: Any) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """What lowers each program that a checkpoint of such a state needs, by its name.

    Args:
      like: a tree of `jax.ShapeDtypeStruct` with shardings.
    """
    kinds = {(x.shape, x.dtype, x.sharding): x for x in jax.tree.leaves(like)}
    return {
        f"checksum {x.dtype.name} {list(x.shape)} {number}": functools.partial(
            checksum.lower_of_placed, x
        )
        for number, x in enumerate(kinds.values())
    }


def _checksums(named: Mapping[str, jax.Array]) -> dict[str, int]:
    """Checksums of the values of arrays, wherever they lie; the same in all processes.

    One is waited for before the next begins: on CPUs, processes that have several
    collectives under way enter them in different orders, and wait for each other.
    """
    return {
        name: int(np.asarray(checksum.of_placed(array).addressable_data(0))[0])
        for name, array in named.items()
    }


def save_weights(
    run_directory: str | Path,
    source: models.Checkpoint,
    params: Any,
    recipe: Mapping[str, Any],
    dtype: str,
    write: Callable[..., None] = models.save,
) -> None:
    """Writes the policy as a Hugging Face directory, in place of an older one. All
    processes call it.

    Args:
      source: what was trained; says the architecture and the tokenizer.
      recipe: how, for the model's card.
      dtype: of what is written: that of products in training, which a coarser one
        would not be the same model as. A short run at a small rate moves weights by
        less than a step of bfloat16.
      write: `models.save_classifier` for a reward model.
    """
    card = models.model_card(source.origin, recipe)
    with _in_place_of(Path(run_directory, "huggingface")) as fresh:
        how = {"dtype": dtype, "card": card}
        write(fresh, source.arch, params, source.tokenizer, **how)


def save_adapters(
    run_directory: str | Path,
    source: models.Checkpoint,
    adapters: Any,
    lora: models.Lora,
    recipe: Mapping[str, Any],
) -> None:
    """Writes the policy's adapters as a directory of PEFT, in place of an older one.
    All processes call it.

    Args:
      source: of the weights beside them.
      recipe: how they were trained, for their card.
    """
    with _in_place_of(Path(run_directory, ADAPTER)) as fresh:
        write_adapters(fresh, source, adapters, lora, recipe)


def write_adapters(
    directory: str | Path,
    source: models.Checkpoint,
    adapters: Any,
    lora: models.Lora,
    recipe: Mapping[str, Any],
    dtype: Any = "float32",
) -> None:
    """`models.save_adapter` with what is known of the weights beside them."""
    name, local = source.origin.name, Path(source.origin.name).expanduser()
    models.save_adapter(
        directory,
        source.arch,
        adapters,
        lora,
        base=str(local.absolute()) if local.exists() else name,
        revision=source.origin.revision,
        dtype=dtype,
        tokenizer=source.tokenizer,
        card=models.model_card(source.origin, recipe, library="peft"),
    )


@contextlib.contextmanager
def _in_place_of(directory: Path) -> Iterator[Path]:
    """A directory to write, which then takes the name of this one."""
    fresh = directory.with_name(f"{directory.name}.new")
    if processes.leads():
        shutil.rmtree(fresh, ignore_errors=True)
    processes.gather(None)
    yield fresh
    if processes.leads():
        old = directory.with_name(f"{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        fresh.rename(directory)
        shutil.rmtree(old, ignore_errors=True)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, in the tree's order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
