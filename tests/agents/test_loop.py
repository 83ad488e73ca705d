"""How episodes go on, with an engine and environments that play by a script."""

import dataclasses
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import pytest
import scripted
from scripted import END, TURN, USER, said

from jaxrl_llm.agents.environments import Outcome, Reply
from jaxrl_llm.agents.loop import CannotOpen, Limits, play
from jaxrl_llm.data.types import Prompt
from jaxrl_llm.rollout.engine import Request, Sampling

LIMITS = Limits(max_turns=4, max_tokens=100, max_prompt_length=20)
FIRST = [{"role": "user", "content": "q"}]


@contextmanager
def environments(script, **how):
    made = scripted.Environments(script, **how)
    yield made
    made.shutdown()


def asked(prompts=2, samples=3, max_tokens=8):
    sampling = Sampling(max_tokens=max_tokens)
    found = [
        Prompt(id=i, content=FIRST, tokens=(9,), columns={}) for i in range(prompts)
    ]
    return found, [
        Request(
            prompt_id=prompt.id,
            tokens=prompt.tokens,
            num_samples=samples,
            seed=5,
            sampling=sampling,
        )
        for prompt in found
    ]


def words(key, seed, turn):
    """Two to four turns, the last with a reward."""
    if turn == 1 + (seed + key[1]) % 3:
        return said("!", ended="completed", reward=1.0 + key[1], calls=1)
    return said("ab"[turn % 2] * (1 + seed % 3), calls=2, failures={"bad": 1})


def played(script=words, limits=LIMITS, engine=None, prompts=2, samples=3, **how):
    engine = engine or scripted.Engine()
    with environments(script, **how) as env:
        found = play(engine, env, scripted.Template(), *asked(prompts, samples), limits)
        assert sorted(env.closed) == sorted(key for key, _ in env.opened)
    return found, engine, env


def test_every_turn_reads_exactly_the_tokens_before_it():
    found, engine, env = played()
    seeds = dict(env.opened)
    assert len(set(seeds.values())) == 6
    for group in found:
        for episode in group:
            key = episode.prompt_id, episode.sample
            seen = [r for r in engine.requests if (r.prompt_id, r.first_sample) == key]
            opening = (USER, ord("q"), END, USER, ord("g"), ord("o"), END, TURN)
            assert episode.opening_tokens == opening
            assert [m["content"] for m in episode.opening] == ["q", "go"]
            at = [i for i, t in enumerate(episode.turns) if t.role == "assistant"]
            assert len(seen) == len(at) == 2 + (seeds[key] + key[1]) % 3
            assert [request.turn for request in seen] == [*range(len(at))]
            for request, place in zip(seen, at, strict=True):
                before = [t.tokens for t in episode.turns[:place]]
                assert request.tokens == (*opening, *np.concatenate([[], *before]))
                sampled = episode.turns[place]
                assert sampled.response_mask.all() and sampled.tokens[-1] == END
            # What was said between, and last words that nobody read.
            between = episode.turns[1]
            letter = chr(ord("a"))
            assert between.text == letter * (1 + seeds[key] % 3)
            assert between.tokens.tolist() == [
                USER, *map(ord, between.text), END, TURN,
            ]  # fmt: skip
            assert not between.response_mask.any()
            assert episode.turns[-1].text == "!" and not len(episode.turns[-1].tokens)
            assert episode.status == "completed" and not episode.masked
            did = episode.played
            assert did.calls == 2 * len(at) - 1 and did.failures == {"bad": len(at) - 1}
            assert did.environment == f"of {key}"
            assert did.reward == 1.0 + key[1] == episode.policy_turns[-1].reward
            assert episode.policy_turns[0].reward is None
            assert did.prefilled == sum(len(r.tokens) - 1 for r in seen)


def test_a_reply_without_words_leaves_what_the_template_puts_between_turns():
    def script(key, seed, turn):
        return Reply(ended="completed" if turn else None)

    [[episode]], engine, _ = played(script, prompts=1, samples=1)
    first, between, _ = episode.turns
    assert between.tokens.tolist() == [TURN] and not between.response_mask.any()
    assert engine.requests[1].tokens == (
        *episode.opening_tokens,
        *first.tokens,
        *between.tokens,
    )


def test_a_conversation_that_is_written_otherwise_goes_on_in_a_new_context():
    def script(key, seed, turn):
        return said("abcb"[turn] * 2, ended="completed" if turn == 3 else None)

    def episodes(most, forks=True):
        limits = dataclasses.replace(LIMITS, max_tokens=most, forks=forks)
        engine = scripted.Engine()
        with environments(script) as env:
            template = scripted.Template(rewrites=True)
            found = play(engine, env, template, *asked(1, 4), limits)
        return found[0], engine

    def words(text):
        return [t for c in text.split() for t in (USER, *map(ord, c), END)]

    found, engine = episodes(100)
    for episode in found:
        first, a, second, b, third, c, fourth, last = episode.turns
        assert [t.new_context for t in episode.turns] == [False] * 3 + [True] + [
            False
        ] * 4
        # What the template leaves of two turns of the policy's, and what is new.
        assert b.tokens.tolist() == [*words("q go aa bb"), TURN]
        assert b.text == "bb" and not b.response_mask.any()
        seen = [r for r in engine.requests if r.first_sample == episode.sample]
        opening = list(episode.opening_tokens)
        before = [*opening, *first.tokens, *a.tokens]
        assert [list(r.tokens) for r in seen] == [
            opening,
            before,
            b.tokens.tolist(),
            [*b.tokens, *third.tokens, *c.tokens],
        ]
        assert [r.turn for r in seen] == [0, 1, 2, 3]
        assert episode.num_contexts == 2 and len(last.tokens) == 0
        prompt = Prompt(id=0, content=FIRST, tokens=(9,), columns={})
        assert episode.context_lengths(prompt) == [
            len(before) + len(second.tokens),
            len(seen[3].tokens) + len(fourth.tokens),
        ]
        # What is read again takes room again.
        short, _ = episodes(len(episode.tokens) - len(fourth.tokens) - 1)
        assert short[episode.sample].status == "context"
        assert len(short[episode.sample].policy_turns) == 3
        just, _ = episodes(len(episode.tokens))
        assert just[episode.sample].tokens.tolist()[:-1] == episode.tokens.tolist()[:-1]
    kept, _ = episodes(100, forks=False)
    assert all(e.num_contexts == 1 and len(e.policy_turns) == 4 for e in kept)


def told(groups):
    """All that is known of episodes, to be compared."""
    return [
        [
            (
                *(e.prompt_id, e.sample, e.status, e.tokens.tolist(), e.text),
                *(e.logprobs.tolist(), e.opening_tokens, e.played),
            )
            for e in group
        ]
        for group in groups
    ]


def test_answers_may_be_waited_for_so_that_nothing_hangs_on_their_order():
    limits, orders = dataclasses.replace(LIMITS, together=True), []
    for order in (1, 2, 3):
        found, engine, _ = played(limits=limits, order=order, prompts=5)
        asked = [(r.prompt_id, r.first_sample, r.turn) for r in engine.requests]
        orders.append(asked)
    assert orders[0] == orders[1] == orders[2]
    wanted, *_ = played(prompts=5)
    assert told(found) == told(wanted)


@pytest.mark.parametrize("at_once", [1, 4, 64])
@pytest.mark.parametrize("order", [1, 2])
def test_episodes_do_not_depend_on_the_others_or_on_how_long_answers_take(
    at_once, order
):
    wanted, *_ = played(prompts=5)
    limits = dataclasses.replace(LIMITS, at_once=at_once)
    engine = scripted.Engine(order=order)
    found, _, env = played(limits=limits, engine=engine, order=order, prompts=5)
    assert told(found) == told(wanted)
    assert env.most <= at_once
    assert at_once == 1 or env.most > 1


def endless(key, seed, turn):
    return said("x")


def test_an_episode_ends_at_the_most_turns():
    [[episode]], *_ = played(endless, prompts=1, samples=1)
    assert episode.status == "max_turns" and len(episode.policy_turns) == 4
    # The environment judged the last turn; what it said then nobody read.
    assert episode.turns[-1].text == "x" and len(episode.turns[-1].tokens) == 0


def test_an_episode_ends_where_its_tokens_do():
    # A turn of the policy has no room for its end.
    limits = dataclasses.replace(LIMITS, max_tokens=9, max_turns=99)
    engine = scripted.Engine(length=8)
    found, *_ = played(endless, limits=limits, engine=engine, prompts=8)
    episodes = sum(found, [])
    assert {e.status for e in episodes} == {"max_tokens", "context"}
    for episode in episodes:
        assert len(episode.tokens) <= 9
        if episode.status == "max_tokens":
            assert len(episode.tokens) == 9 or episode.num_sampled == 8
            assert episode.finish_reason == "length"
            assert episode.turns[-1].role == "assistant"
        else:  # x and the tokens around it are 4, and one must be left for a turn
            assert len(episode.tokens) > 9 - 4 - 1
            assert episode.turns[-1].text == "x" and len(episode.turns[-1].tokens) == 0


def test_a_turn_that_is_cut_off_is_not_answered():
    engine = scripted.Engine(cut=lambda request: request.turn == 1)
    [[episode]], *_ = played(endless, engine=engine, prompts=1, samples=1)
    assert episode.status == "max_tokens" and len(episode.policy_turns) == 2
    assert episode.played.reward == 0.0


def test_failures_are_named_and_masked_or_begun_anew():
    def script(key, seed, turn):
        if key == (0, 1):
            raise OSError("no such server")
        if key == (1, 0):
            return Reply(ended="tool_timeout", why="60 s", failures={"timeout": 1})
        return said("", ended="completed")

    both = frozenset({"env_error", "tool_timeout"})
    limits = dataclasses.replace(LIMITS, masked=both)
    found, *_ = played(script, limits)
    assert [[e.status for e in group] for group in found] == [
        ["completed", "env_error", "completed"],
        ["tool_timeout", "completed", "completed"],
    ]
    assert [[e.masked for e in group] for group in found] == [
        [False, True, False],
        [True, False, False],
    ]
    assert found[0][1].played.why == "OSError: no such server"
    assert found[0][1].played.failures == {"env_error": 1}
    assert (found[1][0].played.why, found[1][0].played.failures) == (
        "60 s",
        {"timeout": 1},
    )

    tried = []

    def at_last(key, seed, turn):
        if key == (0, 1) and turn == 1:
            tried.append(seed)
            if len(tried) < 3:
                raise OSError("not yet")
        return said("y", ended="completed" if turn else None)

    limits = dataclasses.replace(LIMITS, retried=both, max_retries=2)
    found, engine, env = played(at_last, limits)
    assert len(set(tried)) == 3  # another environment each time
    again = found[0][1]
    assert again.status == "completed" and not again.masked
    assert again.played.attempt == 2 and again.played.failures == {}
    first = [r for r in engine.requests if (r.prompt_id, r.first_sample) == (0, 1)]
    assert [r.turn for r in first] == [0, 1] * 3
    assert len({r.seed for r in first}) == 3
    # Those beside it are what they would have been.
    alone, *_ = played(lambda *_: said("y", ended="completed" if _[2] else None))
    assert told(found[1:]) == told(alone[1:])

    tried.clear()
    fewer = dataclasses.replace(limits, max_retries=1)
    found, *_ = played(at_last, fewer)
    assert found[0][1].status == "env_error" and found[0][1].masked
    assert found[0][1].played.attempt == 1


def test_an_episode_whose_worth_cannot_be_told_is_masked_and_keeps_its_environment():
    class Mute(scripted.Environments):
        def close(self, key):
            future = Future()
            future.set_result(Outcome(reward=None, environment=self, why="no server"))
            return future

    env = Mute(lambda *_: said("", ended="completed"))
    limits = dataclasses.replace(LIMITS, masked=frozenset({"env_error"}))
    [[found]] = play(scripted.Engine(), env, scripted.Template(), *asked(1, 1), limits)
    env.shutdown()
    assert (found.status, found.masked) == ("env_error", True)
    assert (found.played.why, found.played.environment) == ("no server", env)
    assert found.played.failures == {"env_error": 1}


def test_what_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="prompt 0, episode 0: the conversation .* 26"):
        played(opening=lambda key, seed: "o" * 20, prompts=1, samples=1)

    def broken(key, seed):
        raise OSError("no such server")

    # What has not begun cannot be masked.
    both = {"masked": frozenset({"env_error"}), "retried": frozenset({"env_error"})}
    for policy, attempts in (("masked", 1), ("retried", 3)):
        limits = dataclasses.replace(LIMITS, max_retries=2, **{policy: both[policy]})
        why = f"prompt 0, episode 0: .*attempts: {attempts}.: .* no such server"
        with pytest.raises(CannotOpen, match=why):
            played(opening=broken, prompts=1, samples=1, limits=limits)

    def misused(key, seed, turn):
        raise ValueError("there is no tool 'f'")

    with pytest.raises(ValueError, match="^there is no tool 'f'"):
        played(misused, prompts=1, samples=1)
    prompts, requests = asked()
    with pytest.raises(ValueError, match="prompt ids played twice: .0."):
        with environments(endless) as env:
            parts = scripted.Engine(), env, scripted.Template()
            play(*parts, prompts[:1] * 2, requests, LIMITS)
