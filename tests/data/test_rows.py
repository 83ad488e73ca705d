import dataclasses

import chex
import numpy as np
import pytest

from jaxrl_llm.data import packing
from jaxrl_llm.data import rows as batch
from jaxrl_llm.data.types import Completion, Prompt


def prompt(id, *tokens):
    return Prompt(id=id, content="", tokens=tokens, columns={})


def completion(prompt_id, sample, tokens, logprobs):
    return Completion(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        raw_logprobs=np.array(logprobs, np.float32),
        finish_reason="stop",
        weight_version=0,
        text="",
    )


PROMPTS = [prompt(7, 10, 11), prompt(3, 20, 21, 22)]
COMPLETIONS = [
    [completion(7, 0, [12], [-0.5]), completion(7, 1, [13, 14], [-1.0, -2.0])],
    [completion(3, 0, [23, 24, 25], [-3.0] * 3), completion(3, 1, [26], [-4.0])],
]
ADVANTAGES = np.array([[1.0, -1.0], [0.5, -0.5]], np.float32)


def make(**how):
    layout = packing.Layout(**how)
    return packing.make_rows(PROMPTS, COMPLETIONS, ADVANTAGES, layout=layout)


def sequences(rows):
    """What each sequence of a batch holds, wherever it lies; {id: {field: list}}."""
    found = {}
    for s in range(rows.num_sequences):
        where = rows.sequence_ids == s
        assert len(set(np.nonzero(where)[0])) <= 1, "a sequence lies in one row"
        found[s] = {
            field.name: getattr(rows, field.name)[where].tolist()
            for field in dataclasses.fields(rows)
            if isinstance(getattr(rows, field.name), np.ndarray)
            and field.name != "sequence_ids"
        }
    return found


def test_one_sequence_per_row_by_hand():
    rows = make()
    assert rows.tokens.shape == (4, 16) and rows.num_sequences == 4
    np.testing.assert_array_equal(rows.tokens[1, :5], [10, 11, 13, 14, 0])
    np.testing.assert_array_equal(rows.sequence_ids[1, :5], [1, 1, 1, 1, -1])
    np.testing.assert_array_equal(rows.positions[1, :5], [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(rows.response_mask[1, :5], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(rows.sampler_logprobs[1, :5], [0, 0, -1, -2, 0])
    np.testing.assert_array_equal(rows.advantages[1, :5], [0, 0, -1, -1, 0])
    assert rows.old_logprobs is None and rows.ref_logprobs is None


def test_packed_rows_by_hand():
    # Lengths 3 4 6 4 need 3 rows of 8: 6, 4 and 4 open them, 3 joins the first 4. Then
    # by cost: 36, 16 + 9, 16.
    rows = make(pack_length=8)
    assert rows.tokens.shape == (3, 8)
    np.testing.assert_array_equal(
        rows.sequence_ids,
        [[2] * 6 + [-1] * 2, [1] * 4 + [0] * 3 + [-1], [3] * 4 + [-1] * 4],
    )
    np.testing.assert_array_equal(rows.tokens[1], [10, 11, 13, 14, 10, 11, 12, 0])
    np.testing.assert_array_equal(rows.positions[1], [0, 1, 2, 3, 0, 1, 2, 0])


def test_packing_changes_where_sequences_lie_and_nothing_else():
    assert sequences(make()) == sequences(make(pack_length=8, rows_multiple=4))


def test_padding_holds_zeros():
    for rows in (make(rows_multiple=8), make(pack_length=8, rows_multiple=8)):
        assert rows.tokens.shape[0] == 8
        padding = rows.sequence_ids == -1
        prompt_or_padding = ~rows.response_mask
        assert not rows.tokens[padding].any() and not rows.positions[padding].any()
        assert not rows.response_mask[padding].any()
        assert not rows.sampler_logprobs[prompt_or_padding].any()
        assert not rows.advantages[prompt_or_padding].any()


@pytest.mark.parametrize("pack_length", [None, 8, 100])
def test_no_row_has_more_sequences_than_the_capacity(pack_length):
    rows = make(pack_length=pack_length)
    held = [len(set(row)) for row in rows.sequence_ids.tolist()]
    assert max(held) <= rows.sequence_capacity <= 2 * (max(held) + 1)


@pytest.mark.parametrize("pack_length", [None, 8])
def test_mini_batches_share_a_shape_and_lose_nothing(pack_length):
    three = PROMPTS + [prompt(5, 30)]
    completions = COMPLETIONS + [[completion(5, g, [31], [-1.0]) for g in range(2)]]
    rows = packing.make_rows(
        three,
        completions,
        np.ones((3, 2)),
        layout=packing.Layout(pack_length=pack_length),
    )
    rows = dataclasses.replace(rows, old_logprobs=rows.sampler_logprobs * 2)
    parts = packing.mini_batches(
        rows, 2, 2, layout=packing.Layout(pack_length=pack_length)
    )
    assert len(parts) == 2
    chex.assert_trees_all_equal_shapes_and_dtypes(*parts)
    whole = sequences(rows)
    assert sequences(parts[0]) == {s: whole[s] for s in range(4)}
    second = sequences(parts[1])
    assert [second[0], second[1]] == [whole[4], whole[5]]
    assert second[2]["tokens"] == second[3]["tokens"] == []


def test_one_mini_batch_is_the_batch():
    (part,) = packing.mini_batches(
        make(pack_length=8), 2, 2, layout=packing.Layout(pack_length=8)
    )
    expected = make(pack_length=8)
    chex.assert_trees_all_equal(part, expected)


def test_a_shuffle_is_a_function_of_its_seed_and_keeps_groups_together():
    def groups(seed):
        parts = packing.mini_batches(make(), 1, 2, seed=seed)
        return [[s["tokens"] for s in sequences(part).values()] for part in parts]

    orders = [groups(seed) for seed in range(8)]
    assert orders == [groups(seed) for seed in range(8)]
    assert any(order != orders[0] for order in orders)
    whole = [s["tokens"] for s in sequences(make()).values()]
    assert all(sorted(order) == sorted([whole[:2], whole[2:]]) for order in orders)


def test_pad_rows_adds_padding():
    padded = batch.pad_rows(make(), 6)
    assert padded.tokens.shape == (6, 16) and padded.num_sequences == 4
    assert (padded.sequence_ids[4:] == -1).all() and not padded.response_mask[4:].any()


def test_lay_out_by_hand():
    # 21 tokens need 3 rows of 10: 7, 5 and 4 open them; 3 joins the 4, 2 the 5.
    assert packing.lay_out([2, 3, 4, 5, 7], 10) == [[4], [3, 0], [2, 1]]
    assert packing.lay_out([2, 3], None) == [[0], [1]]


def test_lay_out_takes_a_row_more_if_the_fewest_do_not_do():
    # 18 tokens would fit 2 rows of 10 by their sum, but 6 + 6 do not fit together.
    assert packing.lay_out([6, 6, 6], 10) == [[0], [1], [2]]


def test_lay_out_prefers_few_rows_to_even_ones():
    # Evenly, 6 and 5 are in rows of their own, then 4 with 5, and 5 fits nowhere.
    assert packing.lay_out([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_rows_of_a_lognormal_mix_are_full_and_none_holds_very_many_sequences():
    drawn = np.random.default_rng(0).lognormal(np.log(1500) - 0.32, 0.8, 512)
    lengths = np.clip(drawn, 2, 16384).astype(int).tolist()
    rows = packing.lay_out(lengths, 16384)
    assert sum(lengths) > 0.95 * 16384 * len(rows)
    assert max(map(len, rows)) < 1.5 * len(lengths) / len(rows)


def test_lay_out_fits_and_keeps_every_sequence():
    lengths = np.random.default_rng(0).integers(1, 65, 300).tolist()
    rows = packing.lay_out(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64


def test_rows_of_packing_come_in_parts_of_padding_at_the_end():
    # 4 rows of 8 could be needed for 4 sequences of up to 6; 3 are, with 17 tokens.
    layout = packing.Layout(pack_length=8, micro_batch_size=2, longest=6)
    rows = packing.make_rows(PROMPTS, COMPLETIONS, ADVANTAGES, layout=layout)
    assert rows.tokens.shape == (4, 8)
    in_use = (rows.sequence_ids >= 0).any(axis=1)
    # Micro-batch 0 is rows 0 and 2, and the costliest two; micro-batch 1 has the third.
    np.testing.assert_array_equal(in_use, [1, 1, 1, 0])
    assert packing.token_efficiency(rows, 2) == 17 / (4 * 8)
    assert packing.token_efficiency(rows, 1) == 17 / (3 * 8)


def test_shared_prompts_by_hand():
    rows = make(pack_length=10, share_prompts=True)
    np.testing.assert_array_equal(rows.tokens[0, :7], [20, 21, 22, 23, 24, 25, 26])
    np.testing.assert_array_equal(rows.tokens[1, :5], [10, 11, 12, 13, 14])
    np.testing.assert_array_equal(rows.sequence_ids[0], [2] * 6 + [3] + [-1] * 3)
    np.testing.assert_array_equal(rows.prompt_ids[0], [1] * 7 + [-1] * 3)
    np.testing.assert_array_equal(rows.positions[0, :7], [0, 1, 2, 3, 4, 5, 3])
    previous = batch.previous_tokens(rows)
    np.testing.assert_array_equal(previous[0, 3:7], [2, 3, 4, 2])  # 22 is before 26
    np.testing.assert_array_equal(previous[1, 2:5], [1, 1, 3])
    # In rows of 6 the two responses to the second prompt need a copy each.
    assert make(pack_length=6, share_prompts=True).tokens.shape == (3, 6)


def test_shared_prompts_are_undone_by_another_layout():
    everything = list(range(4))
    again = packing.take(make(pack_length=10, share_prompts=True), everything)
    assert sequences(again) == sequences(make())
    twice = packing.take(make(pack_length=10, share_prompts=True), [3, 1, 1])
    whole = sequences(make())
    assert sequences(twice) == {0: whole[3], 1: whole[1], 2: whole[1]}


def test_bucket_rounds_up_a_little_and_to_few_sizes():
    assert [packing.bucket(n, 16) for n in (1, 16, 17, 129, 257)] == [
        16,
        16,
        32,
        144,
        288,
    ]
    for n in range(1, 3000):
        assert 0 <= packing.bucket(n) - n < max(1, n / 8)
        assert 0 <= packing.bucket(n, 16) - n < max(16, n / 8)
    assert len({packing.bucket(n) for n in range(1025, 2049)}) == 8


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"layout": packing.Layout(pack_length=5)},
            "sequence 2 has 6 tokens, more than pack_length 5",
        ),
        ({"advantages": ADVANTAGES[:1]}, "advantages are 1 x 2, but there are 2"),
        ({"completions": COMPLETIONS[::-1]}, "a completion of prompt 3 stands with"),
        ({"prompts": [prompt(7), PROMPTS[1]]}, "prompt 7 has no tokens"),
        (
            {"completions": [[completion(7, 0, [1], [])] * 2, COMPLETIONS[1]]},
            "completion 0 of prompt 7 has 1 tokens but 0 logprobs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "advantages": ADVANTAGES,
    }
    with pytest.raises(ValueError, match=message):
        packing.make_rows(**arguments | change)


def test_groups_must_divide_the_batch():
    with pytest.raises(ValueError, match="4 sequences are no whole number of groups"):
        packing.mini_batches(make(), 1, 3)
