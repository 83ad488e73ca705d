"""Section `agent` of a configuration: episodes of several turns."""

from typing import Any, Literal

from pydantic import Field

from jaxrl_llm.config.section import Course, Free, Name, Section

OnStatus = Literal["score", "mask", "retry"]


class StatusConfig(Section):
    """What becomes of an episode by how it ended. score: its reward counts. mask:
    nothing is learned from it, and the others of its group are compared without it.
    retry: it is played again, at most agent.max_retries times, then masked. An episode
    that ended by itself always counts."""

    max_turns: OnStatus = "score"
    """It had agent.max_turns turns."""
    max_tokens: OnStatus = "score"
    """A turn reached rollout.max_response_length, or the episode agent.max_tokens."""
    context: OnStatus = "score"
    """What the environment said left no room for another turn in agent.max_tokens."""
    parse_error: OnStatus = "score"
    """Calls of tools could not be read, again and again."""
    tool_timeout: OnStatus = "mask"
    """The environment took longer than agent.turn_timeout_s."""
    env_error: OnStatus = "retry"
    """The environment broke. Where its `reset` fails, there is no episode to mask or to
    score: with retry it is tried again, and then the run stops."""


class AgentConfig(Section):
    """What the policy acts on, turn by turn: tools, an environment, or both."""

    tools: tuple[Name, ...] = ()
    """Functions that it may call: python, which runs programs by the section sandbox,
    or module:function, with types and a docstring in Google's style."""
    environment: Name | dict[Name, Name] | None = None
    """calculator, higher_lower, wordle3, blackjack, textarena:ID, gem:ID, or the
    module:Class of an environment, of which every episode gets its own: with `step`, it
    is played by text; else its public methods are tools (TRL's environment_factory). Or
    several by name, chosen by the column `environment`."""
    params: dict[str, Any] = {}
    """Keyword arguments of the class."""
    parser: Literal["auto", "hermes", "qwen3_coder", "llama", "bracket"] = "auto"
    """How calls of tools are written; auto: as the chat template has them."""
    max_turns: Course[int] = Field(8, gt=0)
    """Turns of the policy in an episode."""
    max_tokens: int | None = Field(None, gt=0)
    """Tokens of an episode behind its first prompt: all that is sampled, of which
    rollout.max_response_length bounds a single turn, and all that is read between.
    max_turns times rollout.max_response_length if not given, which it must be with
    on_rewrite=fork."""
    max_tool_calls: Course[int | None] = Field(None, gt=0)
    """Calls in an episode; a call beyond them is answered by a refusal. No bound if not
    given."""
    turn_timeout_s: Course[float] = Field(30.0, gt=0)
    """Longest time an environment may take for one answer."""
    reproducible: Course[bool] = False
    """Wait for all answers before more is generated: what is computed together, and so
    the last bit of log-probabilities, is then always the same. Else a turn goes on as
    soon as its own answer is there."""
    workers: Free[int] = Field(256, gt=0)
    """Environments under way at a time on each host, each in a worker of its own for
    its whole episode."""
    isolation: Free[Literal["auto", "process", "thread"]] = "auto"
    """Where environments run. process: each in a worker process, which is killed when
    an answer takes too long. thread: in this process, as is needed for a reward
    function that takes `environments`. auto: processes, but for what cannot be sent
    there, and for the package's own games."""
    memory_gib: Free[float | None] = Field(8.0, gt=0)
    """Address space of each such process; null for all there is."""
    on_rewrite: Course[Literal["keep", "fork"]] = "keep"
    """What happens where the chat template writes earlier turns otherwise once the
    conversation goes on, as Qwen3's leaves out what was thought. keep: the policy reads
    on behind what it sampled. fork: it reads the conversation as the template writes it
    now, as it does of a server, in a new context that sees nothing of the old one. All
    contexts are one episode, with one reward, and their tokens, of those read again
    too, count in max_tokens."""
    on_status: Course[StatusConfig] = StatusConfig()
    max_retries: Course[int] = Field(2, ge=0)
    """How often an episode is played again, see `on_status`."""
