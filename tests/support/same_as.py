"""The code here does what an older commit did: the guard of a refactoring.

    python tests/support/same_as.py OLD_COMMIT [--only PREFIX] [--optimised] [--no-hlo]

Short runs of a tiny model, each `python -m jaxrl_llm train` in processes of its own,
are made by both codes on this machine, from the same configurations and inputs. What
they leave behind must be equal: every metric but times and speeds, every completion,
every setting, the bytes of the trained weights, and the compiled programs, as XLA
optimised them, but for names and the order of what does not depend on each other. New
metrics, settings and files are listed; any other difference makes the exit status 1.

Proven is only that these runs are the same, on CPUs. A program whose arguments change
their order counts as another one. The runs of the old commit, from a git worktree of
its own, are kept in ~/.cache/jaxrl_llm_same_as for the next time.
"""

import argparse
import gzip
import hashlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = CACHE / "jaxrl_llm_same_as"
TIMEOUT_S = 900
SHOWN = 6
"""Of one kind of difference, so many are printed."""
VERSION = 1
"""Of what is kept of the old commit; with another one it is run anew."""
TRIVIAL = 20
"""Programs of no more instructions are not compared: JAX makes one of each operation
outside of `jit`."""

# What a run is cut to, whatever its configuration says.
SMALL = {
    "data.train.size": "40", "data.train.system_prompt": "null",
    "data.val.size": "4", "data.val.system_prompt": "null",
    "data.train_batch_size": "4", "rollout.n": "4", "rollout.max_response_length": "8",
    "rollout.max_num_seqs": "8", "rollout.decode_chunk": "4",
    "actor.optim.lr": "0.005",
    "reward.functions": "[{name: 'same_as_reward:small_ids'}]",
    "val.n": "2", "val.threshold": "0.4", "trainer.total_training_steps": "3",
    "trainer.test_freq": "2", "trainer.save_freq": "0", "trainer.num_examples": "0",
}  # fmt: skip
# And where SMALL does not fit a configuration.
UNGROUPED = {"data.train_batch_size": "8", "rollout.n": "1"}
FITTING = {
    "dapo": {"algorithm.filter_groups.metric": "small_ids"},
    "ppo": {"trainer.critic_warmup": "1", "critic.optim.lr": "0.005"},
    "reinforce_pp": UNGROUPED | {"actor.ppo_mini_batch_size": "4"},
    "remax": UNGROUPED,
}
JUDGE = {"reward.model.path": "JUDGE", "reward.model.dtype": "float32"}
# By name: the configuration, the changes, and devices, processes or a kill.
OTHERS = {
    "killed_and_resumed": ("grpo", {"trainer.save_freq": "1"}, {"killed": True}),
    "reward_model": ("rloo", JUDGE, {}),
    "placement_groups": ("ppo", JUDGE | {
        "actor.use_kl_loss": "true",
        "placement.groups": "{learn: 0-3, generate: '4,6', judge: '5,7'}",
        "placement.actor": "learn", "placement.rollout": "generate",
        "placement.critic": "judge", "placement.reference": "judge",
        "placement.reward": "judge",
    }, {"devices": 8}),
    "two_processes": ("ppo", {
        "algorithm.use_kl_in_reward": "true", "algorithm.kl_ctrl.type": "adaptive",
        "rollout.mesh.tensor": "2",
    }, {"devices": 2, "processes": 2}),
    "ppo_fsdp_tensor": ("ppo", {
        "data.train_batch_size": "8", "actor.mesh": "{fsdp: 4, tensor: 2}",
        "actor.ppo_mini_batch_size": "4", "actor.micro_batch_size": "4",
        "actor.pack_length": "96", "critic.mesh": "{fsdp: 4, tensor: 2}",
        "rollout.mesh": "{data: -1, tensor: 2}",
    }, {"devices": 8}),
    "share_prompts": ("grpo", {
        "actor.share_prompts": "true", "actor.micro_batch_size": "1",
        "actor.ppo_epochs": "2", "rollout.n": "6",
    }, {}),
    "context_parallel": ("grpo", {
        "actor.mesh": "{data: 2, fsdp: 2, context: 2}", "actor.remat": "dots",
        "actor.entropy_coeff": "0.01",
    }, {"devices": 8}),
    "corrected_bfloat16": ("gspo", {
        "actor.dtype": "bfloat16", "actor.remat": "full",
        "actor.keep_probabilities": "true", "actor.ref_refresh_steps": "2",
        "actor.use_kl_loss": "true",
        "algorithm.rollout_correction": "{rollout_is: token, rollout_rs: token_k1,"
        " rollout_rs_threshold: 3.0}",
        "rollout.quantization": "int8", "rollout.kv_cache_dtype": "int8",
    }, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: a configuration of the old commit, and how it is changed and started."""

    name: str
    config: str
    changes: dict[str, str] = field(default_factory=dict)
    devices: int = 1
    """Simulated ones, of each process."""
    processes: int = 1
    killed: bool = False
    """By SIGKILL within step 3; then it goes on. Programs are those of the end."""


def cases(names: Iterable[str]) -> list[Case]:
    """Every case, given the names of the configurations that there are."""
    found = []
    for name in sorted(names):
        if name.endswith("_cpu.yaml") and "vllm" not in name:
            short = name.removesuffix("_smollm2_cpu.yaml")
            found.append(
                Case(name.removesuffix(".yaml"), name, SMALL | FITTING.get(short, {}))
            )
    for name, (short, changes, how) in OTHERS.items():
        changes = SMALL | FITTING.get(short, {}) | changes
        found.append(Case(name, f"{short}_smollm2_cpu.yaml", changes, **how))
    return found


# Runs

# Every Python that a run starts begins with it: the environment may hold an editable
# install of another tree, whose modules would stand in for those that one lacks.
SITE = """
import atexit, os, sys
tree = os.environ["SAME_AS_TREE"]

def foreign(path):
    return os.path.realpath(path) != tree and os.path.isdir(path + "/jaxrl_llm/models")

sys.path[:] = [path for path in sys.path if not foreign(path)]

@atexit.register
def say_what_is_not_of_the_tree():
    names = [n for n in sys.modules if n.split(".")[0] in ("jaxrl_llm", "sharding")]
    files = [getattr(sys.modules[n], "__file__", None) or tree for n in names]
    with open(os.environ["SAME_AS_IMPORTED"], "a") as log:
        wrong = [f for f in files if not os.path.realpath(f).startswith(tree)]
        log.writelines(f + "\\n" for f in wrong)
"""
REWARD = '''
import os, pathlib, signal, time

def small_ids(completion_ids, **_):
    """The share of tokens with an id below 100. Kills the run that has done step 2 and
    saved it, if it is asked to."""
    run = pathlib.Path(os.environ.get("SAME_AS_KILL", "/none"))
    log = run / "metrics.jsonl"
    if log.exists() and '"step": 2,' in log.read_text():
        while not (run / "checkpoints" / "2").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]
'''


def write_inputs(folder: Path) -> None:
    """A random Llama, two layers of width 32, as MODEL, and as JUDGE the same with a
    head that scores. A token is a byte. No code of the package makes them."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = {c: i for i, c in enumerate(sorted(bytes_.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = bytes_, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template="{% for m in messages %}{{ m.role + '\n' + m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}",
        clean_up_tokenization_spaces=False,
    )
    config = {
        "model_type": "llama", "vocab_size": 264, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 8192, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "float32", "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    of_layer = {
        "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
        "input_layernorm": (32,), "post_attention_layernorm": (32,),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (264, 32), "model.norm": (32,)}
    shapes |= {f"model.layers.{i}.{k}": v for i in (0, 1) for k, v in of_layer.items()}
    draw = np.random.default_rng(0).standard_normal
    for role, kind, head, size in (
        ("MODEL", "LlamaForCausalLM", "lm_head", 264),
        ("JUDGE", "LlamaForSequenceClassification", "score", 1),
    ):
        tensors = {}
        for name, shape in (shapes | {head: (size, 32)}).items():
            drawn = draw(shape) / np.sqrt(shape[-1]) + (len(shape) == 1)
            tensors[f"{name}.weight"] = drawn.astype(np.float32)
        tokenizer.save_pretrained(folder / role)
        said = json.dumps(config | {"architectures": [kind]})
        (folder / role / "config.json").write_text(said)
        save_file(tensors, folder / role / "model.safetensors", {"format": "pt"})


def inputs() -> Path:
    """The folder of models, start-up file and reward; written once."""
    made = "".join((inspect.getsource(write_inputs), SITE, REWARD))
    folder = CACHE / "inputs" / digest(made)[:12]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        write_inputs(fresh)
        (fresh / "sitecustomize.py").write_text(SITE)
        (fresh / "same_as_reward.py").write_text(REWARD)
        fresh.rename(folder)
    return folder


class Failed(Exception):
    """A run that did not end as it should; the message ends with what it printed."""


def run(case: Case, tree: Path, old: Path, optimised: bool, hlo: bool) -> dict:
    """What the code in `tree` makes of a case, with configurations of `old`."""
    given, start = inputs(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same-as-") as temporary:
        folder = Path(temporary).resolve()
        changes = {"model.path": "MODEL", **case.changes, "output_dir": folder / "run"}
        command = [sys.executable, "-m", "jaxrl_llm", "train"]
        command += [str(old / "configs" / case.config)]
        for key, value in changes.items():
            value = given / value if value in ("MODEL", "JUDGE") else value
            command.append(f"--{key}={value}")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX")}
        # With this scheduler, devices that share a few cores may enter independent
        # collectives in different orders, and wait for each other.
        flags = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        if hlo:
            flags += " --xla_dump_hlo_as_text --xla_dump_large_constants --xla_dump_to="
        environment |= {
            "PYTHONPATH": f"{given}{os.pathsep}{tree}",
            "PYTHONPYCACHEPREFIX": str(CACHE / "compiled"),
            "PYTHONHASHSEED": "0",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(case.devices),
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "SAME_AS_TREE": str(tree),
            "XLA_FLAGS": flags,
        }
        if not optimised:
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if case.killed:
            killed = environment | {"SAME_AS_KILL": str(folder / "run")}
            start_all(command, killed, folder / "killed", case.processes, -9)
        start_all(command, environment, folder / "ended", case.processes, 0)
        found = left_behind(folder / "run") | {"seconds": time.monotonic() - start}
        return found | {"programs": list(programs(folder / "ended")) if hlo else None}


def start_all(
    command: list[str], environment: dict, folder: Path, count: int, wanted: int
) -> None:
    """Runs `count` processes until all have ended with status `wanted`. What they print
    and import, and their programs, are in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}"]
    joined += ["--num-processes", str(count), "--process-id"]
    members: list[tuple[subprocess.Popen, Path]] = []
    try:
        for index in range(count):
            own = folder / str(index)
            own.mkdir(parents=True)
            flags = environment["XLA_FLAGS"]
            flags += str(own) if flags.endswith("=") else ""
            process = subprocess.Popen(
                command + ([*joined, str(index)] if count > 1 else []),
                cwd=folder,
                env=environment
                | {"XLA_FLAGS": flags, "SAME_AS_IMPORTED": f"{own}/foreign"},
                stdout=(own / "said").open("w"),
                stderr=subprocess.STDOUT,
            )
            members.append((process, own))
        deadline = time.monotonic() + TIMEOUT_S
        for process, own in members:
            try:
                status = process.wait(max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = f"none within {TIMEOUT_S} s"
            if status != wanted:
                end = (own / "said").read_text(errors="replace").splitlines()[-12:]
                raise Failed("\n".join([f"exit status {status}, not {wanted}:", *end]))
            if wanted == 0 and (foreign := (own / "foreign").read_text()):
                raise Failed(f"modules of another tree were imported:\n{foreign}")
    finally:
        for process, _ in members:
            process.kill()
            process.wait()


def left_behind(directory: Path) -> dict[str, Any]:
    """What of a run directory is compared."""
    config = (directory / "config.yaml").read_text().replace(str(directory), "RUN")
    rollouts, weights = (
        sorted((directory / name).iterdir()) for name in ("rollouts", "huggingface")
    )
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {
        "metrics": [{k: v for k, v in x.items() if not of_time(k)} for x in lines],
        "config": flat(yaml.safe_load(config)),
        "rollouts": {path.name: path.read_text().splitlines() for path in rollouts},
        "weights": {
            path.name: digest(path.read_bytes())
            for path in weights
            if path.name != "README.md"  # names the version, older ones had none
        },
        "files": sorted(path.name for path in directory.iterdir()),
    }


def of_time(name: str) -> bool:
    """Whether a metric depends on time or memory."""
    kept = ("perf/token_efficiency", "perf/total_num_tokens")
    return name.startswith(("timing_s/", "perf/")) and name not in kept


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted path."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    leaves = [flat(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items()]
    return {k: v for one in leaves for k, v in one.items()}


def digest(content: str | bytes) -> str:
    """As short as it may be, so that no two are equal by accident."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:32]


# Programs

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_BRACED = r"\{[^{}]*\}"
for _ in range(4):  # so deep may braces be nested
    _BRACED = rf"\{{(?:[^{{}}\"]|{_QUOTED}|{_BRACED})*\}}"
_NAMES = re.compile(
    rf"/\*.*?\*/|, (?:metadata|frontend_attributes|origin|control-predecessors)="
    rf"{_BRACED}|, channel_id=\d+"
)
_CALLED = re.compile(r"(\w+)=(%[\w.\-]+|\{%[^{}]*\})")
_NAME = re.compile(r"%[\w.\-]+")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?(%[\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.\-]+) .*\{$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")


def programs(directory: Path) -> Iterator[dict[str, Any]]:
    """The programs among XLA's dumps that are not trivial, in a form without names."""
    for path in sorted(directory.rglob("*after_optimizations.txt")):
        found = canonical(path.read_text())
        if found["size"] > TRIVIAL:
            yield {"name": path.name.split(".")[1], **found}


def canonical(text: str) -> dict[str, Any]:
    """A program's number of instructions; `hash`, equal for programs that are equal but
    for names and order; `lines`, how often each instruction stands there, with operands
    told by what computes them.

    The hash of an instruction is one of its text with its operands and the computations
    that it calls replaced by theirs; that of a computation is one of all in it.
    """
    head, *body = text.splitlines()
    whole = {}  # hash of each computation
    lines: Counter[str] = Counter()
    inside: dict[str, str] = {}  # hash and opcode of each instruction
    opcodes: dict[str, str] = {}
    root = name = None
    for line in body:
        if match := _COMPUTATION.match(line):
            name, root, inside, opcodes = match[1], None, {}, {}
        elif line.startswith("}"):
            whole[name] = digest("\n".join([root, *sorted(inside.values())]))
        elif name and (match := _INSTRUCTION.match(line)):
            is_root, own, said = match.groups()
            said = _NAMES.sub("", said)
            hashed = _CALLED.sub(lambda m: m[1] + "=" + renamed(m[2], whole), said)
            inside[own] = digest(renamed(hashed, inside))
            opcodes[own] = "%" + _OPCODE.search(" " + said)[1]
            shown = _CALLED.sub(lambda m: m[1] + "=...", said)
            lines[renamed(shown, opcodes)] += 1
            root = inside[own] if is_root else root
    head = _NAMES.sub("", head.partition(",")[2])
    lines[f"head {head}"] = 1
    # The entry computation is the last.
    return {
        "hash": digest(head + whole[name]),
        "size": lines.total() - 1,
        "lines": lines,
    }


def renamed(text: str, names: dict[str, str]) -> str:
    """`text` with each %name replaced."""
    return _NAME.sub(lambda match: names[match[0]], text)


# Comparison


def compare(old: dict, new: dict) -> tuple[list[str], list[str], str]:
    """Differences, additions, and in words what is the same."""
    differences, additions = [], []

    def mappings(kind: str, before: dict, after: dict, may_grow: bool = True) -> None:
        changed = [f"{kind} {key} is missing" for key in before if key not in after]
        more = [f"{kind} {key}" for key in after if key not in before]
        changed += [
            f"{kind} {key}: {short(value)} -> {short(after[key])}"
            for key, value in before.items()
            if key in after and value != after[key]
        ]
        if may_grow:
            additions.extend(more)
        else:
            changed += [f"{key} is new" for key in more]
        differences.extend(shortened(changed))

    for kind, which in ("setting", "config"), ("weights", "weights"):
        mappings(kind, old[which], new[which])
    mappings("file", *(dict.fromkeys(of["files"]) for of in (old, new)))
    for before, after in zip(old["metrics"], new["metrics"], strict=False):
        mappings(f"step {before['step']}, metric", before, after)
    steps = ({x["step"]: None for x in of["metrics"]} for of in (old, new))
    mappings("metrics of step", *steps, may_grow=False)
    names = (dict.fromkeys(of["rollouts"]) for of in (old, new))
    mappings("rollouts", *names, may_grow=False)
    for name in sorted(old["rollouts"].keys() & new["rollouts"].keys()):
        before, after = old["rollouts"][name], new["rollouts"][name]
        if len(before) != len(after):
            differences.append(f"{name}: {len(before)} lines -> {len(after)}")
        changed = [i for i, x in enumerate(before) if x not in after[i : i + 1]]
        if changed:
            one, other = (json.loads((x + ["{}"])[changed[0]]) for x in (before, after))
            fields = [k for k in one | other if one.get(k) != other.get(k)]
            differences.append(
                f"{name}: {len(changed)} of {len(before)} completions differ; the "
                f"first in {', '.join(fields) or 'how it is written'}"
            )
    count = sum(map(len, old["rollouts"].values()))
    weights = sum(name.endswith(".safetensors") for name in old["weights"])
    same = f"{len({name for line in old['metrics'] for name in line})} metrics x "
    same += f"{len(old['metrics'])} lines, {count} completions, "
    same += f"{weights} weight file{'s' * (weights > 1)}"
    if new["programs"] is not None:
        differences += compare_programs(old["programs"], new["programs"])
        same += f", {len(old['programs'])} programs"
    return differences, additions, same


def compare_programs(old: list[dict], new: list[dict]) -> list[str]:
    """Those that only one of two runs compiled, each beside the likest of the other."""
    both = Counter(p["hash"] for p in old) & Counter(p["hash"] for p in new)

    def only(those: list[dict]) -> list[dict]:
        left, found = Counter(both), []
        for program in sorted(those, key=lambda p: -p["size"]):
            left[program["hash"]] -= 1
            if left[program["hash"]] < 0:
                found.append(program | {"lines": Counter(program["lines"])})
        return found

    said, others = [], only(new)
    for program in only(old):
        title = f"program {program['name']} of {program['size']} instructions"
        common = [(program["lines"] & other["lines"]).total() for other in others]
        if max(common, default=0) < program["size"] / 2:
            said.append(f"{title} is missing")
            continue
        other = others.pop(common.index(max(common)))
        title += f" is another, now {other['name']} of {other['size']}"
        lines = []
        for sign, left in (
            ("-", program["lines"] - other["lines"]),
            ("+", other["lines"] - program["lines"]),
        ):
            shown = [f"{sign} {n} x {line[:300]}" for line, n in left.items()]
            lines += shortened(shown)
        lines = lines or ["the same instructions, with other operands or arguments"]
        said.append("\n        ".join([title, *lines]))
    for other in others:
        said.append(f"program {other['name']} of {other['size']} instructions is new")
    return said


def short(value: Any) -> str:
    """One line of it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def shortened(lines: list[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"... and {more} more like these"] if more > 0 else [])


# The old commit


def git(*arguments: str) -> str:
    """What git prints, in the working tree."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def worktree(commit: str) -> Path:
    """The tree of a commit."""
    path = CACHE / "trees" / commit[:12]
    if not path.exists():
        git("worktree", "add", "--force", "--detach", str(path), commit)
    return path.resolve()


def kept(case: Case, commit: str, old: Path, given: argparse.Namespace) -> dict:
    """What the old commit makes of a case, from the cache if it is there."""
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    key = [asdict(case), given.optimised, inputs().name, versions]
    key += [sys.version, os.cpu_count(), VERSION]
    name = f"{case.name}-{digest(json.dumps(key))[:12]}.json.gz"
    path = CACHE / "results" / commit[:12] / name
    if path.exists() and not given.fresh:
        return json.loads(gzip.decompress(path.read_bytes()))
    found = run(case, old, old, given.optimised, hlo=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(gzip.compress(json.dumps(found).encode()))
    fresh.rename(path)
    return json.loads(gzip.decompress(path.read_bytes()))


def judged(case: Case, commit: str, old: Path, given: argparse.Namespace) -> bool:
    """Runs and compares one case and prints what came of it. True if it is the same."""
    differences, additions, same, took = [], [], "", ""
    try:
        before = kept(case, commit, old, given)
        try:
            after = run(case, ROOT, old, given.optimised, given.hlo)
            differences, additions, same = compare(before, after)
            took = f" ({after['seconds']:.1f} s)"
        except Failed as error:
            differences = [f"the new code fails: {error}"]
    except Failed as error:
        differences = [f"the old code fails: {error}"]
    lines = [f"{case.name}  {'DIFFERENT' if differences else f'same: {same}'}{took}"]
    lines += [f"    {line}" for line in differences]
    if additions:
        lines.append(f"    added: {'; '.join(additions)}")
    print("\n".join(lines), flush=True)
    return not differences


def main() -> int:
    """Exit status 0 if every case is the same."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("commit", help="the old one")
    add("--only", default="", help="cases that begin so")
    add("--list", action="store_true", help="the names of the cases")
    add("--jobs", type=int, default=1, help="cases at a time")
    add("--no-hlo", dest="hlo", action="store_false", help="leave out programs")
    add("--optimised", action="store_true", help="with XLA's optimisations: slower")
    add("--fresh", action="store_true", help="run the old commit again")
    given = parser.parse_args()
    commit = git("rev-parse", "--verify", f"{given.commit}^{{commit}}").strip()
    configs = git("ls-tree", "--name-only", f"{commit}:configs").split()
    chosen = [c for c in cases(configs) if c.name.startswith(given.only)]
    if given.list or not chosen:
        print("\n".join(c.name for c in chosen) or f"no case begins so: {given.only}")
        return 0 if chosen else 2
    old = worktree(commit)
    inputs()
    start = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        same = list(pool.map(lambda c: judged(c, commit, old, given), chosen))
    bad = [c.name for c, fine in zip(chosen, same, strict=True) if not fine]
    took = f"{time.monotonic() - start:.0f} s"
    print(f"{len(same) - len(bad)} of {len(same)} cases as in {commit[:12]} ({took})")
    print(f"different: {', '.join(bad)}\n" if bad else "", end="")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
