"""What a run is: typed, frozen, complete. Every field is read somewhere.

`parsing.load` reads a YAML file; `Config` checks each field and that they fit together,
before anything is loaded. Keys that share veRL's name keep veRL's meaning.
"""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxrl_llm.config.checks import misfits
from jaxrl_llm.config.names import Overlong, device_numbers
from jaxrl_llm.config.schema_agent import AgentConfig
from jaxrl_llm.config.schema_algorithm import AlgorithmConfig
from jaxrl_llm.config.schema_training import (
    ActorConfig,
    ComputeConfig,
    CriticConfig,
    DistillationConfig,
)
from jaxrl_llm.config.section import (
    Course,
    Free,
    Name,
    PathText,
    Rounding,
    Section,
)


class ModelConfig(Section):
    """Which weights to start from."""

    path: PathText
    """A Hugging Face directory or hub id, a .gguf file, or package:NAME/FILE.gguf for a
    GGUF file that an installed Python package ships; or a directory or hub id of PEFT,
    whose adapter is added to the model that it names."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: PathText | None = None
    """Directory or hub id of another tokenizer; the model's own if not given."""


class SourceConfig(Section):
    """Where rows come from."""

    path: PathText
    """FILE.jsonl, FILE.jsonl.gz, FILE.parquet, package:NAME/FILE for one of these that
    an installed Python package ships, hub:ID, disk:DIR (a saved Hugging Face data set),
    or reasoning_gym:TASK; or episodes:TEXT, what is said before an environment's first
    words, which may be nothing."""
    params: dict[str, Any] = {}
    """reasoning_gym: the task's parameters. hub: arguments of `datasets.load_dataset`
    such as `name` and `revision`."""
    split: Name = "train"
    """hub and disk only."""
    size: int | None = Field(None, gt=0)
    """At most this many questions; all if not given (reasoning_gym and episodes need
    it)."""
    seed: int = Field(0, ge=0)
    """reasoning_gym and episodes only: which questions are drawn."""
    prompt_key: Name = "prompt"
    """The column that holds the question: text, or a list of chat messages."""
    prompt_template: str | None = None
    """Text around the question; {name} stands for column `name`."""
    system_prompt: str | None = None
    """Put before the question as a system message."""


class DatasetConfig(SourceConfig):
    """Where questions come from."""

    answer_key: Name = "answer"
    """The column that holds the reference answer; rewards get it as `answer`. Without a
    column `answer`, that of veRL's files is read: reward_model.ground_truth."""


class DataConfig(Section):
    """The questions, and how many of them make a step."""

    train: DatasetConfig
    more_train: dict[Name, DatasetConfig] = {}
    """More sets of questions to train on by name, joined to `train`; rewards get the
    name as the column data_source. `size` says how much of each."""
    val: DatasetConfig | None = None
    """Held-out questions. Those that also stand in `train` are taken out of `train`."""
    more_val: dict[Name, DatasetConfig] = {}
    """More sets of held-out questions by name; the metrics of each stand under its
    name, such as val-core/NAME/acc/mean@1."""
    train_batch_size: int = Field(64, gt=0)
    """Prompts per step; each is answered rollout.n times."""
    max_prompt_length: int = Field(512, gt=0)
    """Tokens, chat template included."""
    overlong_prompts: Overlong = "error"
    """What to do with longer ones. `truncate` keeps the end of the prompt."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template; off for base models."""
    chat_template_file: PathText | None = None
    """A chat template to use, and to export with the weights, in the place of the
    tokenizer's."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking: false}."""
    template_time: datetime | None = None
    """What a chat template that has the date in it takes for now, such as 2025-01-31.
    If not given, when the run began: it goes on with the prompts it had."""
    shuffle: bool = True
    """A new order every epoch, a function of `seed` alone."""


class SamplingConfig(Section):
    """How tokens are drawn."""

    temperature: float = Field(1.0, ge=0)
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = Field(-1, ge=-1)
    """Only the k most likely tokens; -1 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Only the smallest set of tokens whose probability reaches p."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Only tokens at least min_p times as likely as the most likely one."""

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        if self.top_k == 0:
            raise ValueError("top_k is 0, which keeps no token; -1 keeps all")
        return self


class RolloutMeshConfig(Section):
    """Devices along each generation axis; one may be -1: what is left."""

    data: int = Field(-1, ge=-1)
    """Replicas of the model, each with its share of the requests."""
    tensor: int = Field(1, ge=-1)
    """Devices one replica is split over."""


class ServersConfig(Section):
    """Servers that generate: running ones (`urls`), or ours, which end with the run."""

    urls: tuple[Name, ...] = ()
    """Running servers, such as http://host:8000. Requests are spread over them."""
    command: tuple[str, ...] = ()
    """Starts one of ours: the Python of its environment, or a container. rollout.jaxrl
    has this run's Python if not given."""
    args: tuple[str, ...] = ()
    """More arguments of the command, such as vLLM's --gpu-memory-utilization 0.5."""
    env: dict[str, str] = {}
    """More variables of its environment."""
    devices: tuple[str, ...] = ()
    """One server of ours per entry, which becomes its CUDA_VISIBLE_DEVICES. Without
    entries one server, which sees the devices that the trainer sees."""
    port: int | None = Field(None, gt=0, lt=65536)
    """Port of the first server of ours; the others follow; free ports if not given."""
    weights_dir: PathText | None = None
    """Folder that weights are sent through; trainer and servers must see it. Memory
    (/dev/shm) for servers of ours where there is such, else output_dir."""
    start_timeout_s: float = Field(900.0, gt=0)
    """Longest wait for a server to come up."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Longest wait for the responses to one prompt. A server of ours that takes longer
    hangs, and is started again."""
    max_restarts: int = Field(3, ge=0)
    """How often servers may be lost between two transfers of weights."""
    reproducible: Course[bool] = False
    """Draw every group of responses from a seed of its own: the same weights then give
    the same responses, whatever else a server does meanwhile. vLLM draws row by row for
    it, which makes a step of hundreds of rows some times slower."""
    max_probe_diff: float = Field(0.1, gt=0)
    """Mean difference in nats between server and trainer, on probes after each transfer
    of weights, that stops the run."""


class VllmConfig(ServersConfig):
    """Servers of vLLM: running ones (`urls`), or ours, which end with the run."""

    command: tuple[str, ...] = ("python", "-m", "vllm.entrypoints.openai.api_server")
    """Starts one of ours: the Python of vLLM's environment, or a container."""


class SglangConfig(ServersConfig):
    """Servers of SGLang: running ones (`urls`), or ours, which end with the run."""

    command: tuple[str, ...] = ("python", "-m", "sglang.launch_server")
    """Starts one of ours: the Python of SGLang's environment, or a container."""


class JaxrlConfig(ServersConfig):
    """Servers of `jaxrl serve`: running ones (`urls`), or ours, which end with the run.
    Each response is drawn from a key of its own in any case."""


class EngineConfig(Section):
    """How long responses may be, and the jax engine that makes them."""

    max_response_length: int = Field(512, gt=0)
    """Tokens, the stop token included."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end a response, besides the model's own stop tokens."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that end a response, besides the model's own stop tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text that rewards get and stop strings are looked
    for in. The token that ends a response is in no text."""
    max_num_seqs: Rounding[int] = Field(256, gt=0)
    """Sequences decoded together; more wait."""
    decode_chunk: Rounding[int] = Field(64, gt=0)
    """Tokens per dispatch of the jax engine. Between dispatches stop strings are looked
    for and memory is shared out."""
    prefill_tokens: Rounding[int] = Field(8192, gt=0)
    """Tokens of prompts that the jax engine reads per dispatch on each replica; longer
    prompts are read in pieces."""
    cache_gib: Rounding[float | None] = Field(None, gt=0)
    """Memory of the jax engine for keys and values on each device. Not given: what
    max_num_seqs of the longest sequences need, or what is free if that is less;
    sequences wait for room, or are preempted and go on later."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights, activations and KV cache."""
    quantization: Literal["int8", "fp8"] | None = None
    """Dtype of the matrices in the jax engine's layers, with a scale per output; fp8
    also of what they multiply, a scale per token. mismatch/ tells what it costs in
    precision; algorithm.rollout_correction corrects for it."""
    kv_cache_dtype: Literal["int8", "fp8"] | None = None
    """Dtype of the jax engine's KV cache, with a scale per head and token; `dtype` if
    not given."""
    checksum_freq: Free[int] = Field(100, ge=0)
    """Compare checksums of the engine's weights with the trainer's at the first load
    and every so many steps; 0: never."""
    mesh: Rounding[RolloutMeshConfig] = RolloutMeshConfig()


class RolloutConfig(EngineConfig, SamplingConfig):
    """Generation during training."""

    engine: Literal["jax", "vllm", "sglang", "jaxrl"] = "jax"
    """jax: the compiled decode loop of this package. vllm, sglang: servers, see the
    sections of these names. jaxrl: the loop of jax in servers, see `jaxrl`."""
    vllm: Rounding[VllmConfig] = VllmConfig()
    sglang: Rounding[SglangConfig] = SglangConfig()
    jaxrl: Rounding[JaxrlConfig] = JaxrlConfig()
    n: int = Field(8, gt=0)
    """Responses per prompt (the group)."""
    lora: Rounding[Literal["merge", "separate"]] = "merge"
    """What the engine takes of a policy with actor.lora. merge: all weights after each
    step, adapters added to them. separate: its weights once, and after each step only
    the adapters, which are computed beside them."""
    max_mismatch: Free[float] = Field(0.05, gt=0)
    """Mean difference in nats between log-probabilities of sampler and trainer, over
    which a correction is recommended."""


class RewardFunctionConfig(Section):
    """One term of the reward."""

    name: Name
    """exact, numeric, gsm8k, math, reasoning_gym, code, judge, or module:function with
    TRL's signature f(prompts, completions, completion_ids, **columns), or with veRL's
    f(data_source, solution_str, ground_truth, extra_info)."""
    weight: float = 1.0
    params: dict[str, Any] = {}
    """Keyword arguments passed to the function."""


class RewardModelConfig(ComputeConfig):
    """A model that scores prompt and response, one more term of the reward by the name
    reward_model."""

    path: PathText
    """A Hugging Face directory or hub id of a ...ForSequenceClassification with one
    label, that reads the policy's tokens."""
    revision: Name | None = None
    """Branch, tag or commit on the hub."""
    weight: float = 1.0
    """Its scores are multiplied by it."""
    offload: Free[bool] = False
    """Weights wait in the host's memory while nothing is scored."""


class SandboxConfig(Section):
    """Where programs that a model wrote run, and what each run of one may use."""

    level: Free[Literal["auto", "bwrap", "landlock", "url", "none"]] = "auto"
    """bwrap: bubblewrap, in name spaces of their own; and below that Landlock and
    seccomp, which landlock is alone. In both a program reads Python's library and
    nothing else, writes no file, starts no process and has no network. auto: the first
    of these that holds here; an error if none does. url: a service elsewhere. none: a
    process that may do all that this one may."""
    url: Free[Name | None] = None
    """level url: the address of a SandboxFusion service, such as http://host:8080."""
    cpu_s: Course[float] = Field(5.0, gt=0)
    """Seconds of processor time of one run, rounded up to whole ones."""
    wall_s: Course[float] = Field(10.0, gt=0)
    """Seconds from its start."""
    memory_gib: Course[float] = Field(1.0, gt=0)
    """Address space of one run."""
    output_mib: Course[float] = Field(8.0, gt=0)
    """Most that one run prints."""
    jobs: Free[int | None] = Field(None, gt=0)
    """Programs that run at a time; as many as there are processors if not given."""
    packages: Course[tuple[PathText, ...]] = ()
    """Folders that programs can read and import from, besides Python's library."""

    @model_validator(mode="after")
    def _check(self) -> "SandboxConfig":
        if (self.url is not None) != (self.level == "url"):
            raise ValueError(
                f"level is {self.level} and url is {self.url}; level url needs a url, "
                "and no other level reads one"
            )
        return self


class OverlongBufferConfig(Section):
    """A penalty that grows over the last tokens a response may have (DAPO)."""

    len: int = Field(gt=0)
    """So many of the last of the rollout.max_response_length tokens cost."""
    penalty_factor: float = Field(1.0, gt=0)
    """What the longest response costs."""


class RewardConfig(Section):
    """What a response is worth: the weighted sum of the functions and the model."""

    functions: tuple[RewardFunctionConfig, ...] = ()
    """At least one, or a model; none are needed for distillation alone."""
    model: RewardModelConfig | None = None
    """None if not given."""
    overlong_buffer: OverlongBufferConfig | None = None
    """In training, takes a penalty off the reward of responses that are nearly too
    long; off if not given."""
    timeout_s: float = Field(60.0, gt=0)
    """Longest time one function may take for one step."""
    isolation: Free[Literal["auto", "process", "thread"]] = "auto"
    """Where functions run that are not built in. process: each in a process of its own,
    which lasts, sees no accelerator, and is killed when a call takes too long; an error
    for one that cannot be sent there. auto: that one in a thread of this process, which
    a line says. thread: all of them; needed for what they leave in this process, and
    for accelerators that they use."""
    memory_gib: Free[float | None] = Field(8.0, gt=0)
    """Address space of each such process; null for all there is."""
    on_error: Literal["raise", "zero"] = "raise"
    """A function that raises, hangs or returns NaN stops the run, or scores 0 and is
    counted in the metrics."""


class ValConfig(SamplingConfig):
    """How the held-out questions are answered."""

    n: int = Field(1, gt=0)
    """Sampled answers per question."""
    greedy: bool = True
    """Also answer once greedily."""
    threshold: float = 1.0
    """A reward of at least this counts as correct."""


class LoopConfig(Section):
    """How often, and what is written."""

    test_freq: int = Field(0, ge=0)
    """Validate every so many steps; 0: only before and after."""
    val_before_train: bool = True
    save_freq: int = Field(0, ge=0)
    """Save a checkpoint every so many steps; 0: only at the end."""
    max_ckpt_to_keep: int = Field(2, gt=0)
    """The newest so many, and the best by validation besides."""
    max_skipped_steps: int = Field(3, ge=0)
    """The run stops after so many steps in a row without one finite gradient of the
    policy, or of the critic: it would learn nothing any more. 0: it goes on."""
    resume: Literal["auto", "never", "force"] = "auto"
    """auto: go on from the newest checkpoint in output_dir, if there is one. force:
    also if functions, rows or held-out questions are not those that the run began with,
    or steps are missing from what it wrote."""
    max_hours: float | None = Field(None, gt=0)
    """Stop after the first step that ends later than so many hours after the start, as
    if asked to; the same command goes on. No bound if not given."""
    stop_grace_s: float = Field(4.0, gt=0)
    """Seconds that the step under way has to end after SIGTERM. If it does not, it is
    given up, and the run goes on from its newest checkpoint."""
    profile: str | None = Field(None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """FIRST:LAST, such as 3:5: write a trace of these steps, both included, to
    output_dir/profile, for xprof and Perfetto."""
    save_hf: bool = True
    """Write the final weights as a Hugging Face directory, output_dir/huggingface, in
    the dtype that products took in training (actor.dtype, learner.dtype)."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Besides the files, which are always written."""
    project: Name = "jaxrl_llm"
    """Project name for the loggers."""
    tags: tuple[Name, ...] = ()
    """What the loggers can find the run by, besides the model, the estimator, the loss
    and the engine."""
    num_examples: int = Field(3, ge=0)
    """Completions shown in the terminal."""


class TrainerConfig(LoopConfig):
    """How long, how often, and what is written."""

    total_training_steps: Course[int] = Field(gt=0)
    """A run that is done goes on with more. A learning rate that decays then does so
    over all of them."""
    critic_warmup: Course[int] = Field(0, ge=0)
    """The first so many steps update only the critic; they count as steps."""


class PlacementConfig(Section):
    """Which devices each role computes on. A role without a group has all devices, if
    there are no groups."""

    groups: dict[str, str] = {}
    """Device numbers by the name of a group, such as {train: 0-5, generate: 6-7}. Every
    device is in one group."""
    actor: str | None = None
    """Its group."""
    critic: str | None = None
    """Its group; the actor's if not given."""
    reference: str | None = None
    """Group of the KL term's reference policy; the actor's if not given."""
    reward: str | None = None
    """Group of the reward model; the actor's if not given."""
    teacher: str | None = None
    """Group of distillation.teacher; the actor's if not given."""
    rollout: str | None = None
    """Group of the jax engine; the actor's if not given."""

    @model_validator(mode="after")
    def _check(self) -> "PlacementConfig":
        for name, text in self.groups.items():
            try:
                device_numbers(text)
            except ValueError as error:
                raise ValueError(f"group {name}: {error}") from None
        roles = ("actor", "critic", "reference", "reward", "teacher", "rollout")
        used = {role: getattr(self, role) for role in roles}
        for role, group in used.items():
            if group is not None and group not in self.groups:
                raise ValueError(
                    f"{role} is {group}, which is none of the groups "
                    f"{', '.join(self.groups) or '(there are none)'}"
                )
        if self.groups and self.actor is None:
            raise ValueError("actor: needed, one of the groups; the others follow it")
        idle = [name for name in self.groups if name not in used.values()]
        if idle:
            raise ValueError(f"group {', '.join(idle)} has no role")
        return self


class Config(Section):
    """A whole run."""

    output_dir: Free[PathText]
    """Everything the run writes is in here."""
    seed: int = Field(0, ge=0)
    """Seed of data order, sampling and everything else that is random."""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig = RewardConfig()
    agent: AgentConfig | None = None
    """Episodes of several turns; a prompt has one response if not given."""
    sandbox: SandboxConfig = SandboxConfig()
    distillation: DistillationConfig | None = None
    """Off if not given."""
    val: Free[ValConfig] = ValConfig()
    placement: Rounding[PlacementConfig] = PlacementConfig()
    trainer: Free[TrainerConfig]
    function_sources: dict[str, str] = {}
    """A hash of the source of every module:function above that learning calls; filled
    in by the run, which goes on only with the same."""

    @property
    def longest_response(self) -> int:
        """Tokens behind a prompt, at most: of a response, or of all turns."""
        if self.agent is None:
            return self.rollout.max_response_length
        turns = self.agent.max_turns * self.rollout.max_response_length
        return self.agent.max_tokens or turns

    @property
    def longest_sequence(self) -> int:
        """Tokens of a prompt and what follows it, at most."""
        return self.data.max_prompt_length + self.longest_response

    @property
    def sequence_keys(self) -> str:
        """What `longest_sequence` is the sum of."""
        response = "agent.max_tokens" if self.agent else "rollout.max_response_length"
        return f"data.max_prompt_length + {response}"

    @model_validator(mode="after")
    def _check(self) -> "Config":
        problems = list(misfits(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
