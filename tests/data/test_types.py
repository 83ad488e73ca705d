import dataclasses

import numpy as np
import pytest

from jaxrl_llm.data.types import Completion, Episode, Prompt, Turn, single_turn

COMPLETION = Completion(
    prompt_id=7,
    sample=1,
    tokens=np.array([3, 4], np.int32),
    logprobs=np.array([-1.0, -2.0], np.float32),
    raw_logprobs=None,
    finish_reason="stop",
    weight_version=5,
    text="ab",
)


def test_a_completion_is_an_episode_of_one_turn():
    ((episode,),) = single_turn([[COMPLETION]])
    assert (episode.prompt_id, episode.sample) == (7, 1)
    assert episode.tokens is COMPLETION.tokens
    assert episode.logprobs is COMPLETION.logprobs
    assert episode.response_mask.tolist() == [True, True]
    assert episode.weight_versions.tolist() == [5, 5] and episode.weight_version == 5
    assert (episode.text, episode.finish_reason) == ("ab", "stop")
    assert episode.status == "completed" and episode.num_sampled == 2
    cut = Episode.of(dataclasses.replace(COMPLETION, finish_reason="length"))
    assert cut.status == "max_tokens"


def test_an_episode_joins_its_turns():
    later = dataclasses.replace(COMPLETION, weight_version=6, finish_reason="length")
    turns = (
        Turn.observed("user", [1], "?"),
        Turn.sampled(later),
        Turn.observed("tool", [8, 9], "42"),
        Turn.sampled(COMPLETION),
        Turn.observed("tool", [2], "end"),
    )
    episode = Episode(prompt_id=7, sample=0, turns=turns)
    assert episode.tokens.tolist() == [1, 3, 4, 8, 9, 3, 4, 2]
    assert episode.response_mask.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]
    assert episode.logprobs[episode.response_mask].tolist() == [-1, -2, -1, -2]
    assert episode.weight_versions[episode.response_mask].tolist() == [6, 6, 5, 5]
    assert episode.weight_version == 5  # the oldest
    assert (episode.text, episode.finish_reason) == ("?ab42abend", "stop")
    assert episode.policy_turns == (turns[1], turns[3]) and episode.num_sampled == 4
    prompt = Prompt(id=7, content="", tokens=(5,), columns={})
    assert episode.first_tokens(prompt) == (5,)
    begun = dataclasses.replace(episode, opening_tokens=(5, 6))
    assert begun.first_tokens(prompt) == (5, 6)


def test_what_was_cut_off_does_not_count_as_the_policy_s_probability():
    full = np.array([-1.5, -2.0], np.float32)
    cut = dataclasses.replace(COMPLETION, full_logprobs=full)
    turn = Turn.sampled(cut)
    assert turn.logprobs is full
    np.testing.assert_allclose(turn.kept_mass, [np.exp(-0.5), 1.0])
    turns = (turn, Turn.observed("tool", [8], "42"), turn, Turn.sampled(COMPLETION))
    episode = Episode(prompt_id=7, sample=0, turns=turns)
    np.testing.assert_allclose(episode.kept_mass, [np.exp(-0.5), 1.0] * 2)
    assert len(Episode.of(COMPLETION).kept_mass) == 0
    short = dataclasses.replace(turn, kept_mass=turn.kept_mass[:1])
    with pytest.raises(ValueError, match="turn 0 has 2 tokens but 1 kept_mass"):
        Episode(prompt_id=7, sample=0, turns=(short,))


def test_what_is_no_episode_is_refused():
    few = dataclasses.replace(COMPLETION, logprobs=COMPLETION.logprobs[:1])
    expected = "episode 1 of prompt 7: turn 0 has 2 tokens but 1 logprobs"
    with pytest.raises(ValueError, match=expected):
        Episode.of(few)
    with pytest.raises(ValueError, match="episode 0 of prompt 7 has no turns"):
        Episode(prompt_id=7, sample=0, turns=())


def test_media_that_nothing_would_read_are_refused():
    with pytest.raises(ValueError, match="prompt 3 has 1 entries in its field media"):
        Prompt(id=3, content="", tokens=(1,), columns={}, media=(b"an image",))
