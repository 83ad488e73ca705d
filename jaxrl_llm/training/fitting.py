"""What stays on devices from step to step, and how many rows at a time fit beside it.

Where `actor.micro_batch_size` is not given, it is the largest whose compiled update
fits and that has at most `MOST_TOKENS`. That is the program that the run uses, so
nothing is compiled in vain but for the tries before it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.config import resume
from jaxrl_llm.config.checks import uses_kl
from jaxrl_llm.config.schema import Config
from jaxrl_llm.roles.actor import Actor
from jaxrl_llm.roles.critic import Critic
from jaxrl_llm.roles.reward_model import RewardModel
from jaxrl_llm.roles.sharded_model import ShardedModel
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.sharding import hardware, processes
from jaxrl_llm.sharding.out_of_memory import gib, shortage
from jaxrl_llm.training.settings import placed

Sizes = dict[str, dict[str, int]]
"""Bytes on one device by purpose, for each group of devices."""
FROZEN = "frozen weights"
CACHE, WEIGHTS = "generation cache", "generation weights"
"""What engines call what they have."""
MOST_TOKENS = 16_384
"""Tokens of a micro-batch on each device, or twice as many where each micro-batch
gathers the weights. With more, a device is no faster: on an H100, of Qwen2.5-0.5B, 4 %
slower."""


def kept(
    config: Config,
    actor: Actor,
    engine: Engine,
    critic: Critic | None,
    reward_model: RewardModel | None,
) -> Sizes:
    """Bytes by purpose on each device of every group, as they stay from step to step;
    of the generation cache, what the longest sequences want."""
    state, group_of = actor.abstract_state(), placed(config.placement)
    found: Sizes = {group_of["actor"]: {}}

    def add(role: str, sizes: dict[str, int]) -> None:
        found.setdefault(group_of[role], {}).update(sizes)

    add("actor", {"weights": bytes_of(state.params)})
    add("actor", {"optimizer": bytes_of(state.opt_state)})
    responses = -(-config.data.train_batch_size // jax.process_count())
    longest = config.longest_sequence
    add("rollout", engine.memory(responses * config.rollout.n, longest))
    if critic:
        judge = critic.abstract_state()
        add("critic", {"critic's weights": bytes_of(judge.params)})
        add("critic", {"critic's optimizer": bytes_of(judge.opt_state)})
    if reward_model:
        add("reward", {"reward model": bytes_of(reward_model.abstract_params())})
    if uses_kl(config):
        size = bytes_of(actor.reference.abstract_params())
        add("reference", {"reference": size})
    if actor.teacher:
        add("teacher", {"teacher": bytes_of(actor.teacher.abstract_params())})
    for role, sizes in frozen(actor, critic).items():
        add(role, sizes)
    return found


def frozen(actor: Actor, critic: Critic | None) -> Sizes:
    """Bytes by purpose on each device of weights that are never changed, by role; where
    one of these holds the very arrays of another, 0."""
    known = set()

    def size(source: Any, params: Any) -> int:
        total = 0
        for path, leaf in jax.tree.leaves_with_path(params):
            array = id(source), jax.tree_util.keystr(path), leaf.dtype, leaf.sharding
            total += 0 if array in known else bytes_of(leaf)
            known.add(array)
        return total

    found: Sizes = {}
    if params := actor.abstract_frozen():
        found["actor"] = {FROZEN: size(actor.source, params)}
    reference = actor.reference
    if reference and (params := reference.abstract_frozen()):
        found["reference"] = {f"reference's {FROZEN}": size(reference.base, params)}
    if critic and (params := critic.abstract_frozen()):
        there = size(critic.source, params["decoder"])
        found["critic"] = {f"critic's {FROZEN}": there}
    return found


def beside(config: Config, sizes: Sizes, role: str) -> int:
    """Bytes of what stays on the devices of the actor or the critic while it is
    updated, or of rollout while responses are made, but for what it has itself."""
    there = dict(sizes[placed(config.placement)[role]])
    critics = f"critic's {FROZEN}"
    own = {
        "actor": ("weights", "optimizer", FROZEN),
        "critic": ("critic's weights", "critic's optimizer", critics)
        + (FROZEN,) * (there.get(critics) == 0),
        "rollout": (WEIGHTS,),
    }[role]
    offloaded = [*config.actor.offload]
    if config.reward.model and config.reward.model.offload:
        offloaded.append("reward model")
    if (how := config.distillation) and (
        how.teacher.offload or (role == "actor" and how.mode == "jsd")
    ):
        offloaded.append("teacher")  # or an argument of the update
    for name in (*own, *offloaded, CACHE):  # the cache is given back
        there.pop(name, None)
    return sum(there.values())


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A number of rows that fits, if any does."""

    size: int
    """Rows of a micro-batch."""
    made: Any
    """What has its program compiled."""
    needed: float | int
    """Bytes of the program on each device, arguments and results included."""
    room: int
    """Bytes that there are for it."""

    def said(self, key: str, rows: int) -> str:
        """What was chosen, and why."""
        found = (
            f"{key} is not given: {self.size} of {rows} rows at a time, whose update "
            f"takes {gib(self.needed)} of the {gib(self.room)} that are free for it on "
            "each device"
        )
        return found + "; that is too much" * (self.needed > self.room)


def sized(
    config: Config,
    actor: Actor,
    critic: Critic | None,
    sizes: Callable[[], Sizes],
    actor_of: Callable[[Config], Actor],
    critic_of: Callable[[Config], Critic],
    watch: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    limit: float | int | None = None,
) -> tuple[Config, Actor, Critic | None, list[str]]:
    """The configuration with the micro-batch sizes that were not given, the roles that
    have them, and what was chosen. All processes call it and choose the same.

    A run that goes on keeps the sizes that it has: the sum over micro-batches depends
    on them in the last bit. Where devices do not count their memory, nothing is chosen,
    and a micro-batch is a whole mini-batch.

    Args:
      actor, critic: as the configuration has them.
      sizes: gives `kept` by all roles.
      actor_of, critic_of: make one of a configuration.
      watch: is told what is compiled while it is.
      limit: bytes of a device; if not given, what the devices that are here count.
    """
    if config.actor.micro_batch_size is not None:
        return config, actor, critic, []
    limits = processes.gather(limit or hardware.memory_limit())
    if None in limits:
        return config, actor, critic, []
    if before := begun(config):
        for section in ("actor", "critic"):
            if getattr(config, section).micro_batch_size is None:
                size = getattr(before, section).micro_batch_size
                config = _with(config, section, size)
        size = config.actor.micro_batch_size
        said = f"actor.micro_batch_size is not given: {size or 'all'} rows at a time, "
        made = critic and critic_of(config)
        return config, actor_of(config), made, [f"{said}as the run began"]
    held, room, notes = sizes(), SURELY * min(limits), []

    def choose(
        section: str,
        model: ShardedModel,
        state: Any,
        make: Callable[[Config], Any],
        lower: Callable[[Any], jax.stages.Lowered],
    ) -> tuple[Config, Any]:
        shape = actor.largest_mini_batch().tokens.shape
        found = largest_fit(
            model,
            state,
            shape,
            int(room) - beside(config, held, section),
            lambda size: make(_with(config, section, size)),
            lower,
            watch,
        )
        notes.append(found.said(f"{section}.micro_batch_size", shape[0]))
        return _with(config, section, found.size), found.made

    config, actor = choose(
        "actor",
        actor.policy,
        actor.abstract_state(),
        actor_of,
        Actor.lower_largest_update,
    )
    if critic and config.critic.micro_batch_size is None:
        config, critic = choose(
            "critic",
            critic.model,
            critic.abstract_state(),
            critic_of,
            lambda made: made.lower_update(actor.largest_rows()),
        )
    return config, actor, critic, notes


def begun(config: Any) -> Any:
    """The settings of the run in output_dir, if there is a checkpoint to go on from,
    else None; in all processes the same."""
    directory, found = Path(config.output_dir), None
    if any(path.name.isdecimal() for path in directory.glob("checkpoints/*")):
        found = resume.settings_of(directory)
    return processes.gather(found)[0]


def _with(config: Config, section: str, size: int | None) -> Config:
    part = getattr(config, section).model_copy(update={"micro_batch_size": size})
    return config.model_copy(update={section: part})


def largest_fit(
    model: ShardedModel,
    state: Any,
    shape: tuple[int, int],
    room: int,
    make: Callable[[int], Any],
    lower: Callable[[Any], jax.stages.Lowered],
    watch: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Fit:
    """The largest micro-batch whose compiled update fits.

    Args:
      model: that learns.
      state: its training state, or shapes with shardings.
      shape: rows of the largest mini-batch, and tokens of each.
      room: bytes on each device, for arguments and results too.
      make: what has the program for a micro-batch size.
      lower: gives that program.
      watch: is told what is compiled while it is.
    """
    made = {}

    def needed(size: int) -> float | int:
        made[size] = make(size)
        with watch(f"compiling the update of {size} rows at a time"):
            try:
                return peak(lower(made[size]).compile())
            except jax.errors.JaxRuntimeError as error:
                if shortage(error) is None:
                    raise
                return math.inf  # a TPU's compiler knows how much there is

    guess = functools.partial(estimated, model, state, shape[1])
    size, used = largest(sizes_for(model, *shape), guess, needed, room)
    return Fit(size=size, made=made[size], needed=used, room=room)


def for_measuring(
    make: Callable[[int | None], Actor], beside: int, otherwise: int
) -> tuple[Actor, str]:
    """The actor of a measurement without a micro-batch size, and what was chosen.

    Args:
      make: an actor for a size.
      beside: bytes of what else is on each device.
      otherwise: where devices do not count their memory.
    """
    limit = hardware.memory_limit()
    if limit is None:
        said = f"--micro-batch-size is not given: {otherwise} rows at a time"
        return make(otherwise), said
    actor = make(None)
    shape = actor.largest_mini_batch().tokens.shape
    room = int(SURELY * limit) - beside
    found = largest_fit(
        actor.policy,
        actor.abstract_state(),
        shape,
        room,
        make,
        Actor.lower_largest_update,
    )
    return found.made, found.said("--micro-batch-size", shape[0])


def sizes_for(model: ShardedModel, rows: int, length: int) -> list[int]:
    """Rows of a micro-batch that may be worth a try, ascending: as many on each device,
    a power of two, up to `MOST_TOKENS` or to all.

    Those that leave more than an eighth of the last micro-batch's rows empty are out.
    """
    multiple = model.layout.rows_multiple
    tokens = length // model.partition.parts("tokens")
    most = MOST_TOKENS * (2 if model.mesh.shape["fsdp"] > 1 else 1)
    found = [multiple]
    while found[-1] < rows and 2 * found[-1] // multiple * tokens <= most:
        found.append(2 * found[-1])
    return [
        size
        for size in found
        if size == multiple or size >= rows or -(-rows // size) * size <= rows * 9 / 8
    ]


def estimated(model: ShardedModel, state: Any, length: int, size: int) -> float:
    """Bytes that the update of `size` rows of `length` tokens at a time takes, roughly:
    where to begin to look."""
    arch, how = model.arch, model.settings
    tensor, width = model.mesh.shape["tensor"], jnp.dtype(how.dtype).itemsize
    parts = model.layout.rows_multiple * model.partition.parts("tokens")
    tokens = size * length / parts
    heads = (arch.num_heads + arch.num_kv_heads) * arch.head_dim
    products = 2 * width * (arch.hidden_size + heads + arch.active_size)
    layer = {"none": 3 * products, "dots": products}
    kept = arch.num_layers * layer.get(how.remat, width * arch.hidden_size)
    logits = min(tokens, 4096) * arch.vocab_size * 10 * (model.head == "tokens")
    weights = bytes_of(state.params)
    # Gradients are as large as the weights, which are also copied to be multiplied.
    fixed = bytes_of(state) + weights + weights // 4 * width
    if how.lora:
        fixed += bytes_of(model.abstract_params())
    return fixed + (tokens * (kept + 6 * products) + logits) / tensor


def largest(
    sizes: Sequence[int],
    guess: Callable[[int], float],
    needed: Callable[[int], float | int],
    room: int,
) -> tuple[int, float | int]:
    """The largest of ascending `sizes` that needs no more than `room`, or the smallest
    if none does, and what it needs.

    `needed`, which takes long, is asked of those for which it is likely by `guess`,
    corrected by what is known so far.
    """
    low, high, ratio = -1, len(sizes), 1.0
    known: dict[int, float | int] = {}
    while high - low > 1:
        between = range(low + 1, high)
        likely = [i for i in between if ratio * guess(sizes[i]) <= room]
        if not likely and low >= 0:
            break
        i = likely[-1] if likely else 0
        known[i] = needed(sizes[i])
        if known[i] < math.inf:
            ratio = known[i] / guess(sizes[i])
        low, high = (i, high) if known[i] <= room else (low, i)
    return sizes[max(low, 0)], known[max(low, 0)]


def peak(compiled: jax.stages.Compiled) -> int:
    """Bytes on a device with the program's arguments and results."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def fewer(
    now: int, multiple: int, wanted: int | None, free: int | None, fixed: float | int
) -> int | None:
    """`now` rows halved until what they need should fit; None if too few would be left.

    Args:
      multiple: devices that rows are split over.
      wanted: bytes that `now` rows needed.
      free: bytes that there were; None where that is not known.
      fixed: of `wanted`, what does not depend on the number of rows.
    """
    size = now // 2
    while size >= multiple:
        if free is None or wanted is None:
            return size
        if fixed + (wanted - fixed) * size / now <= SURELY * free:
            return size
        size //= 2
    return None


SURELY = 0.95
"""Share of what is free that one array can have."""


def bytes_of(tree: Any) -> int:
    """Bytes of arrays, or of shapes with shardings, on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
