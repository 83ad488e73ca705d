import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from observations import anew, insert

from jaxrl_llm.data import packing
from jaxrl_llm.data import rows as batch
from jaxrl_llm.data.types import Completion, Episode, Prompt, Turn


def prompt(id, *tokens):
    return Prompt(id=id, content="", tokens=tokens, columns={})


def episode(prompt_id, sample, tokens, logprobs):
    completion = Completion(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(logprobs, np.float32),
        raw_logprobs=np.array(logprobs, np.float32),
        finish_reason="stop",
        weight_version=0,
        text="",
    )
    return Episode.of(completion)


PROMPTS = [prompt(7, 10, 11), prompt(3, 20, 21, 22)]
EPISODES = [
    [episode(7, 0, [12], [-0.5]), episode(7, 1, [13, 14], [-1.0, -2.0])],
    [episode(3, 0, [23, 24, 25], [-3.0] * 3), episode(3, 1, [26], [-4.0])],
]
ADVANTAGES = np.array([[1.0, -1.0], [0.5, -0.5]], np.float32)


def make(**how):
    layout = packing.Layout(**how)
    return packing.make_rows(PROMPTS, EPISODES, ADVANTAGES, layout=layout)


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
    np.testing.assert_array_equal(rows.is_prompt[1, :5], [1, 1, 0, 0, 0])
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
        assert not rows.is_prompt[padding].any()
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
    episodes = EPISODES + [[episode(5, g, [31], [-1.0]) for g in range(2)]]
    rows = packing.make_rows(
        three,
        episodes,
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


def test_a_row_has_no_more_sequences_than_the_number_of_rows_asks_for():
    lengths = [1536, 448, *[64] * 16]
    # By tokens alone: all short ones beside the second, which room for 32 would hold.
    assert [len(row) for row in packing.lay_out(lengths, 2048)] == [1, 17]
    rows = packing.make_rows(
        [prompt(i, *range(n - 1)) for i, n in enumerate(lengths)],
        [[episode(i, 0, [7], [-1.0])] for i in range(18)],
        np.ones((18, 1)),
        layout=packing.Layout(pack_length=2048),
    )
    assert rows.tokens.shape == (2, 2048) and rows.sequence_capacity == 16
    assert sorted(len(set(row)) for row in rows.sequence_ids.tolist()) == [4, 16]


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
    rows = packing.make_rows(PROMPTS, EPISODES, ADVANTAGES, layout=layout)
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
        ({"episodes": EPISODES[::-1]}, "an episode of prompt 3 stands with"),
        ({"prompts": [prompt(7), PROMPTS[1]]}, "prompt 7 has no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {
        "prompts": PROMPTS,
        "episodes": EPISODES,
        "advantages": ADVANTAGES,
    }
    with pytest.raises(ValueError, match=message):
        packing.make_rows(**arguments | change)


def test_groups_must_divide_the_batch():
    with pytest.raises(ValueError, match="4 sequences are no whole number of groups"):
        packing.mini_batches(make(), 1, 3)


# The policy reads before it writes, in between (twice), or never; and a response of
# which nothing was sampled.
OBSERVED = [
    [insert(EPISODES[0][0], {0: [90]}), insert(EPISODES[0][1], {0: [91], 1: [92, 93]})],
    [insert(EPISODES[1][0], {1: [94], 2: [95, 96]}), EPISODES[1][1]],
]


def observed(**how):
    layout = packing.Layout(**how)
    return packing.make_rows(PROMPTS, OBSERVED, ADVANTAGES, layout=layout)


def test_observations_stand_where_they_were_read():
    rows = observed()
    np.testing.assert_array_equal(
        rows.tokens[:, :9],
        [
            [10, 11, 90, 12, 0, 0, 0, 0, 0],
            [10, 11, 91, 13, 92, 93, 14, 0, 0],
            [20, 21, 22, 23, 94, 24, 95, 96, 25],
            [20, 21, 22, 26, 0, 0, 0, 0, 0],
        ],
    )
    np.testing.assert_array_equal(rows.is_prompt[1], [1, 1] + [0] * 14)
    np.testing.assert_array_equal(
        rows.response_mask[1], [0] * 3 + [1, 0, 0, 1] + [0] * 9
    )
    np.testing.assert_array_equal(rows.positions[1, :7], range(7))
    expected = [0, 0, 0, -1, 0, 0, -2]
    np.testing.assert_array_equal(rows.sampler_logprobs[1, :7], expected)
    np.testing.assert_array_equal(rows.advantages[1, :7], [0, 0, 0, -1, 0, 0, -1])


def test_an_episode_may_begin_with_words_of_its_environment():
    begun = dataclasses.replace(OBSERVED[0][1], opening_tokens=(10, 15, 16))
    groups = [[OBSERVED[0][0], begun], OBSERVED[1]]
    layout = packing.Layout(pack_length=16, share_prompts=True)
    rows = packing.make_rows(PROMPTS, groups, ADVANTAGES, layout=layout)
    found = sequences(packing.take(rows, [1, 0]))
    assert found[0]["tokens"] == [10, 15, 16, 91, 13, 92, 93, 14]
    assert found[0]["is_prompt"] == [True] * 3 + [False] * 5
    assert found[1]["tokens"] == [10, 11, 90, 12]
    none = dataclasses.replace(begun, opening_tokens=())
    with pytest.raises(ValueError, match=f"prompt {begun.prompt_id} has no tokens"):
        packing.make_rows(PROMPTS[:1], [[OBSERVED[0][0], none]], ADVANTAGES[:1])


def seen(function, rows):
    """What it says of rows on a device."""
    return np.asarray(function(jax.tree.map(jnp.asarray, rows)))


def test_contexts_see_themselves_alone_and_are_one_sequence():
    episodes = [[anew(episode) for episode in group] for group in OBSERVED]
    assert [e.num_contexts for group in episodes for e in group] == [2, 3, 3, 1]
    assert episodes[0][1].contexts.tolist() == [1, 1, 2, 2, 2]
    assert episodes[0][1].context_lengths(PROMPTS[0]) == [2, 2, 3]
    layout = packing.Layout(pack_length=16, contexts=3)
    rows = packing.make_rows(PROMPTS, episodes, ADVANTAGES, layout=layout)
    kept = observed(pack_length=16)
    found, wanted = sequences(rows), sequences(kept)
    for name in ("tokens", "response_mask", "is_prompt", "advantages"):
        assert [found[s][name] for s in found] == [wanted[s][name] for s in wanted]
    # Prompt, then what the episode read before each of its turns, and the turn.
    assert found[1]["tokens"] == [10, 11, 91, 13, 92, 93, 14]
    assert found[1]["contexts"] == [0, 0, 1, 1, 2, 2, 2]
    assert found[1]["positions"] == [0, 1, 0, 1, 0, 1, 2]
    for name in ("contexts", "positions"):
        assert not getattr(rows, name)[rows.sequence_ids < 0].any()
    np.testing.assert_array_equal(
        seen(batch.places, rows)[rows.sequence_ids == 1], range(7)
    )
    for s, place in itertools.product(range(4), (kept, packing.take(rows, range(4)))):
        np.testing.assert_array_equal(
            seen(batch.places, place)[place.sequence_ids == s],
            range(len(wanted[s]["tokens"])),
        )
    # Drawn twice, they lie side by side, and still no context sees another.
    twice = packing.take(
        rows, [1, 1, 2], layout=dataclasses.replace(layout, pack_length=40)
    )
    assert len(twice.tokens) == 1 and twice.sequence_capacity > 9
    ids, row = seen(batch.attention_ids, twice)[0], twice.sequence_ids[0]
    spans = [(s, c) for s, c in zip(row, twice.contexts[0], strict=True) if s >= 0]
    assert len(set(ids[row >= 0])) == len(set(spans)) == 9
    assert len(set(zip(ids[row >= 0], spans, strict=True))) == 9
    assert (ids[row < 0] == -1).all()
    with pytest.raises(
        ValueError, match="episode 1 of prompt 7 has 3 contexts, .* for 2"
    ):
        packing.make_rows(
            PROMPTS, episodes, ADVANTAGES, layout=packing.Layout(contexts=2)
        )


@pytest.mark.parametrize("seed", range(4))
def test_no_row_has_more_contexts_than_programs_are_made_for(seed):
    draw = np.random.default_rng(seed)
    lengths, counts = draw.integers(1, 40, 60), draw.integers(1, 9, 60)
    rows = packing.lay_out(lengths.tolist(), 64, 12, counts.tolist())
    assert sorted(i for row in rows for i in row) == [*range(60)]
    assert max(counts[row].sum() for row in rows) <= 12
    assert max(lengths[row].sum() for row in rows) <= 64
    ones = packing.lay_out(lengths.tolist(), 64, 4, [1] * 60)
    assert ones == packing.lay_out(lengths.tolist(), 64, 4)


LAYOUTS = {
    "rows": {},
    "packed": {"pack_length": 16, "rows_multiple": 4},
    "micro-batches": {"pack_length": 10, "micro_batch_size": 2, "longest": 9},
    "shared": {"pack_length": 16, "share_prompts": True},
    "shared by few": {"pack_length": 10, "share_prompts": True},
    "pairs": {"sequences_together": 2},
    "packed pairs": {"pack_length": 16, "sequences_together": 2},
    "shared pairs": {"pack_length": 16, "share_prompts": True, "sequences_together": 2},
}


@pytest.mark.parametrize("before, after", list(itertools.permutations(LAYOUTS, 2)))
def test_rearranging_never_changes_a_token_of_an_episode(before, after):
    rows = observed(**LAYOUTS[before])
    rows = dataclasses.replace(rows, old_logprobs=rows.tokens + 0.5 * rows.positions)
    whole, layout = sequences(observed()), packing.Layout(**LAYOUTS[after])

    def read(part):
        """Sequence by sequence, each laid out alone."""
        return sequences(packing.take(part, range(part.num_sequences)))

    def same(found, wanted):
        found = dict(found)
        old = found.pop("old_logprobs")
        assert found == wanted
        assert old == [
            t + 0.5 * i
            for t, i in zip(found["tokens"], found["positions"], strict=True)
        ]

    taken = read(packing.take(rows, [3, 2, 0, 0], layout=layout))
    for i, s in enumerate([3, 2, 0, 0]):
        same(taken[i], whole[s])
    order = packing.mini_batches(rows, 1, 2, layout=layout, seed=1)
    found = [read(part)[s] for part in order for s in range(2)]
    found.sort(key=lambda sequence: [sequence["tokens"][0], sequence["tokens"][3:]])
    wanted = [whole[s] for s in (1, 0, 2, 3)]
    wanted.sort(key=lambda sequence: [sequence["tokens"][0], sequence["tokens"][3:]])
    for one, other in zip(found, wanted, strict=True):
        same(one, other)


def test_behind_a_shared_prompt_the_first_token_may_be_an_observation():
    rows = observed(pack_length=16, share_prompts=True)
    where = np.nonzero(rows.tokens == 10)
    (r,), (start,) = where
    np.testing.assert_array_equal(
        rows.tokens[r, start : start + 9], [10, 11, 90, 12, 91, 13, 92, 93, 14]
    )
    previous = np.asarray(batch.previous_tokens(rows))[r] - start
    # 11 is before 90 and 91; behind these, each token follows the one to its left.
    np.testing.assert_array_equal(
        previous[start + 2 : start + 9], [1, 2, 1, 4, 5, 6, 7]
    )


def test_a_prompt_without_a_response_keeps_its_tokens():
    nothing = dataclasses.replace(
        OBSERVED[0][0], turns=(Turn.observed("tool", [], ""),)
    )
    rows = packing.make_rows(
        PROMPTS[:1],
        [[nothing, OBSERVED[0][1]]],
        ADVANTAGES[:1],
        layout=packing.Layout(pack_length=16, share_prompts=True),
    )
    again = sequences(packing.take(rows, [0, 1]))
    assert [again[s]["tokens"] for s in (0, 1)] == [
        [10, 11],
        [10, 11, 91, 13, 92, 93, 14],
    ]


def test_rows_carry_further_axes():
    def with_routes(rows):
        """Three numbers a token, which tell the token and its position."""
        token, position, ids = (
            np.asarray(x)[..., None]
            for x in (rows.tokens, rows.positions, rows.sequence_ids)
        )
        of_token = np.where(ids >= 0, token * np.array([1, 2, 3]) + position, 0)
        return dataclasses.replace(rows, values=of_token[..., None])

    rows = with_routes(observed(pack_length=16))
    assert rows.values.shape == (*rows.tokens.shape, 3, 1)
    again = packing.take(rows, [2, 0], layout=packing.Layout(length_multiple=3))
    np.testing.assert_array_equal(again.values, with_routes(again).values)
    for part in packing.mini_batches(rows, 1, 2, seed=0):
        np.testing.assert_array_equal(part.values, with_routes(part).values)
    padded = batch.pad_rows(rows, 5, 20)
    assert padded.values.shape == (5, 20, 3, 1)
    np.testing.assert_array_equal(padded.values, with_routes(padded).values)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("pack_length", [None, 16, 40])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_a_pair_is_never_parted(share_prompts, pack_length, micro_batch_size):
    if share_prompts and pack_length is None:
        return
    rng = np.random.default_rng(0)
    # Pairs of prompts that are the same, or differ; every fourth prompt is another.
    prompts = [prompt(p, *([p // 4] * (2 + p % 3 // 2))) for p in range(12)]
    episodes = [
        [
            episode(p, g, rng.integers(0, 9, n), np.zeros(n))
            for g, n in enumerate(rng.integers(1, 6, 4).tolist())
        ]
        for p in range(12)
    ]
    layout = packing.Layout(
        pack_length=pack_length,
        micro_batch_size=micro_batch_size,
        share_prompts=share_prompts,
        sequences_together=2,
        rows_multiple=2,
        longest=8,
    )
    plain = packing.make_rows(prompts, episodes, np.ones((12, 4)))
    rows = packing.make_rows(prompts, episodes, np.ones((12, 4)), layout=layout)
    again = packing.take(plain, range(2, 8), layout=layout)
    parts = packing.mini_batches(plain, 5, 4, layout=layout, seed=3)
    for part in (rows, again, *parts):
        for pair in range(part.num_sequences // 2):
            held = {
                r
                for s in (2 * pair, 2 * pair + 1)
                for r in np.nonzero(part.sequence_ids == s)[0]
            }
            assert len(held) <= 1
        if micro_batch_size:  # rows are computed by the micro-batch, whole
            assert len(part.tokens) % micro_batch_size == 0
    everything = packing.take(rows, range(48))
    assert sequences(everything) == sequences(plain)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda rows: packing.take(
                rows, [0, 1, 2], layout=packing.Layout(sequences_together=2)
            ),
            "3 sequences are no whole number of sequences_together 2",
        ),
        (
            lambda rows: packing.mini_batches(
                rows, 1, 2, layout=packing.Layout(sequences_together=4)
            ),
            "groups of 2 are no whole number of sequences_together 4",
        ),
        (
            lambda rows: packing.take(
                rows,
                [0, 1, 2, 3],
                layout=packing.Layout(pack_length=12, sequences_together=2),
            ),
            "sequences 2 to 3 have 13 tokens, more than pack_length 12",
        ),
    ],
)
def test_what_must_share_a_row_and_cannot_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(observed())


@pytest.mark.parametrize(
    "name", ["pack_length", "micro_batch_size", "longest", "sequences_together"]
)
def test_a_layout_of_nothing_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be positive"):
        packing.Layout(**{name: 0})
