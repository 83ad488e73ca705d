import pytest

from jaxrl_llm.rollout.engine import Request, Sampling


def request(tokens=(1, 2), num_samples=1, seed=0, **sampling):
    return Request(
        prompt_id=7,
        tokens=tokens,
        num_samples=num_samples,
        seed=seed,
        sampling=Sampling(max_tokens=4, **sampling),
    )


@pytest.mark.parametrize(
    "asked, message",
    [
        (request(()), "prompt 7 is empty"),
        (request((1, 100, 2)), "prompt 7 has token 100, but .* vocabulary has 100"),
        (request((1, -1, 2)), "prompt 7 has token -1, but the model's vocabulary"),
        (request(stop_token_ids=(3, 100)), "stop has token 100, but the model's voc"),
        (request((1,) * 7), "prompt 7 has 7 tokens and asks for up to 4 more, but max"),
    ],
    ids=str,
)
def test_a_request_that_no_model_can_answer_says_why(asked, message):
    with pytest.raises(ValueError, match=message):
        asked.check(vocab_size=100, max_model_len=10)


def test_any_token_of_the_vocabulary_may_be_asked_for():
    request((0, 99), stop_token_ids=(0, 99)).check(vocab_size=100, max_model_len=6)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"seed": -1}, "a seed is from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "a seed is from 0 to 4294967295, got 4294967296"),
    ],
)
def test_a_request_for_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        request(**fields)
