import json
import pathlib
from collections import Counter

import pytest
import tiny

from jaxrl_llm.data import prompts, stream
from jaxrl_llm.data.chat_template import Encoder
from jaxrl_llm.data.sources import Source, read_rows
from jaxrl_llm.data.types import Prompt

GSM8K = pathlib.Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
QUESTIONS = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(5)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path, **fields):
    return read_rows(Source(path=str(path), **fields))


def load(train, val=None, tokenizer=None, **fields):
    def source(value):
        return value if isinstance(value, Source | None) else Source(path=value)

    fields = {"max_prompt_length": 512} | fields
    sizes = {"vocab_size": fields.pop("vocab_size", None)}
    encoder = Encoder(tokenizer=tokenizer or tiny.tokenizer(), **sizes)
    return prompts.load(source(train), source(val), encoder, **fields)


def test_jsonl_and_parquet_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl = write(tmp_path / "a.jsonl", QUESTIONS)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(QUESTIONS), tmp_path / "a.parquet"
    )
    assert rows_of(jsonl) == rows_of(tmp_path / "a.parquet") == QUESTIONS
    assert rows_of(tmp_path / "a.parquet", size=2) == QUESTIONS[:2]
    assert rows_of(jsonl, size=2) == QUESTIONS[:2]


def test_a_saved_data_set_is_read_by_split(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(QUESTIONS)
    rows.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(train=rows, test=rows.select([3]))
    both.save_to_disk(tmp_path / "two")
    assert rows_of(f"disk:{tmp_path}/one", size=2) == QUESTIONS[:2]
    assert rows_of(f"disk:{tmp_path}/two", split="test") == QUESTIONS[3:4]
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['train', 'test'\]"):
        rows_of(f"disk:{tmp_path}/two", split="dev")


def test_the_hub_is_read_with_params_and_split(tmp_path):
    # load_dataset takes a local folder where it takes a hub id.
    write(tmp_path / "test.jsonl", QUESTIONS)
    params = {"data_files": {"test": "test.jsonl"}, "cache_dir": str(tmp_path / "c")}
    found = rows_of(f"hub:{tmp_path}", params=params, split="test", size=3)
    assert found == QUESTIONS[:3]
    with pytest.raises(ValueError, match="split"):
        rows_of(f"hub:{tmp_path}", params=params, split="dev")


def test_reasoning_gym_draws_by_task_size_seed_and_params():
    path, params = "reasoning_gym:chain_sum", {"min_terms": 2, "max_terms": 2}
    rows = rows_of(path, size=3, seed=7, params=params)
    assert rows == rows_of(path, size=3, seed=7, params=params)
    assert rows != rows_of(path, size=3, seed=8, params=params)
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"] == row["question"]
        assert row["metadata"]["num_terms"] == 2
        assert row["dataset_params"] == params
        assert eval(row["metadata"]["expression"]) == int(row["answer"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"path": "rows.csv"}, "rows.csv.*FILE.jsonl, .*FILE.parquet, .*hub:ID"),
        ({"path": "disk:nowhere"}, "disk:nowhere"),
        ({"path": "reasoning_gym:chain_sun", "size": 1}, "did you mean 'chain_sum'"),
        ({"path": "reasoning_gym:chain_sum"}, "set `size`"),
        (
            {
                "path": "reasoning_gym:chain_sum",
                "size": 1,
                "params": {"max_term": 2},
            },
            "no parameter 'max_term', did you mean 'max_terms'",
        ),
        (
            {
                "path": "reasoning_gym:chain_sum",
                "size": 1,
                "params": {"min_terms": 9, "max_terms": 2},
            },
            "chain_sum: params .*max_terms",
        ),
        (
            {"path": "reasoning_gym:chain_sum", "size": 1, "split": "test"},
            "split is 'test' but not used",
        ),
    ],
)
def test_a_source_that_cannot_be_read_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        read_rows(Source(**fields))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a", "answer": "b"}\n\n{"prompt": \n', r"a.jsonl:3: not JSON"),
        ("[1]\n", r"a.jsonl:1: not an object but \[1\]"),
        ("\n", "no rows"),
        (
            '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "gold": "b"}\n',
            r"row 1 \(from 0\): no column 'answer'; it has \['prompt', 'gold'\]",
        ),
        ('{"question": "a", "answer": "b"}', "no column 'prompt'"),
        ('{"prompt": "a", "answer": "b", "prompt": "c"}', "key 'prompt' is given twi"),
        ('{"prompt": [{"role": "a", "role": "b"}]}', "key 'role' is given twice"),
        ("[" * 100_000, "a.jsonl:1: not JSON: maximum recursion depth"),
        ('{"prompt": "a", "answer": "b", "completions": 1}', "rename"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / "a.jsonl")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("not Parquet")
    with pytest.raises(ValueError, match=r"a.parquet: not a Parquet file"):
        rows_of(tmp_path / "a.parquet")


def test_fields_that_a_file_does_not_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seed is 3 but not used"):
        rows_of(write(tmp_path / "a.jsonl", QUESTIONS), seed=3)


def test_rows_as_verl_writes_them(tmp_path):
    question = [{"role": "user", "content": "1+1="}]
    row = {"prompt": question, "reward_model": {"style": "rule", "ground_truth": "2"}}
    train = Source(
        path=write(tmp_path / "a.jsonl", [row]), answer_key="reward_model.ground_truth"
    )
    (prompt,) = load(train).train
    assert prompt.content == question
    assert prompt.columns == {"reward_model": row["reward_model"], "answer": "2"}


def render(row, chat_template=True, **fields):
    source = Source(path="a.jsonl", **fields)
    return prompts.render(row, source, chat_template=chat_template)


def test_a_question_is_put_into_its_template_and_after_its_system_prompt():
    row = {"prompt": "1+1?", "level": 3}
    template = "L{level}: {prompt} Use \\boxed{{}}."
    text = "L3: 1+1? Use \\boxed{}."
    assert render(row, prompt_template=template, chat_template=False) == text
    assert render(row, prompt_template=template, system_prompt="Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": text},
    ]


@pytest.mark.parametrize(
    "question, fields, message",
    [
        ("a", {"prompt_template": "{problem}"}, r"\{problem\}.*\['prompt'\]"),
        ("a", {"prompt_template": r"{prompt} \boxed{}"}, "write {{ and }}"),
        ("a", {"prompt_template": "{prompt"}, "write {{ and }}"),
        (" ", {}, "column 'prompt' is empty"),
        (3, {}, "must be text or a list of chat messages, got 3"),
        ([], {}, "must be text or a list"),
        ([{"role": "user"}], {}, "role and content"),
        ("a", {"chat_template": False, "system_prompt": "b"}, "system_prompt needs"),
        (
            [{"role": "user", "content": "a"}],
            {"chat_template": False},
            "need a chat template",
        ),
        (
            [{"role": "user", "content": "a"}],
            {"prompt_template": "{prompt}"},
            "cannot be put around",
        ),
        (
            [{"role": "system", "content": "a"}],
            {"system_prompt": "b"},
            "has a system message",
        ),
    ],
)
def test_a_question_that_cannot_be_rendered_says_why(question, fields, message):
    with pytest.raises(ValueError, match=message):
        render({"prompt": question}, **fields)


def test_tokens_are_the_template_around_the_question():
    tokenizer = tiny.tokenizer()
    encoder = Encoder(tokenizer=tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens = encoder.encode(turns[:1])
    expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens) == expected
    # The assistant's own words are continued, not answered.
    assert tokenizer.decode(encoder.encode(turns)) == expected + "b"
    assert len(encoder.encode("a b")) == 3


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(ValueError, match="row 0 .*set data.chat_template: false"):
        load(path, tokenizer=tiny.tokenizer(chat_template=None))
    found = load(path, tokenizer=tiny.tokenizer(None), chat_template=False)
    assert [len(prompt.tokens) for prompt in found.train] == [4] * 5


def test_a_chat_template_that_rejects_a_question_is_named(tmp_path):
    template = "{{ raise_exception('no users') }}"
    with pytest.raises(ValueError, match=r"row 0 .*the chat template rejects.*no user"):
        load(write(tmp_path / "a.jsonl", QUESTIONS), None, tiny.tokenizer(template))


LENGTHS = [{"prompt": word, "answer": ""} for word in ("abc", "abcdef", "ab")]


def test_overlong_prompts_stop_the_run_by_default(tmp_path):
    path = write(tmp_path / "a.jsonl", LENGTHS)
    with pytest.raises(ValueError, match="row 1 .*6 tokens, data.max_prompt_length is"):
        load(path, chat_template=False, max_prompt_length=4)


def test_overlong_prompts_are_cut_at_the_start_or_dropped(tmp_path):
    path = write(tmp_path / "a.jsonl", LENGTHS)
    fields = dict(chat_template=False, max_prompt_length=4)
    cut = load(path, overlong_prompts="truncate", **fields)
    decode = tiny.tokenizer().decode
    assert [decode(p.tokens) for p in cut.train] == ["abc", "cdef", "ab"]
    assert cut.train[1].content == "abcdef"
    assert (cut.truncated, cut.dropped) == (1, 0)

    rest = load(path, overlong_prompts="drop", **fields)
    assert [(p.id, p.content) for p in rest.train] == [(0, "abc"), (2, "ab")]
    assert (rest.truncated, rest.dropped) == (0, 1)
    with pytest.raises(ValueError, match="every prompt is longer"):
        load(path, overlong_prompts="drop", chat_template=False, max_prompt_length=1)


def test_held_out_questions_are_taken_out_of_training(tmp_path):
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    val = write(tmp_path / "b.jsonl", [QUESTIONS[3], QUESTIONS[1]])
    found = load(train, val)
    assert [p.id for p in found.train] == [0, 2, 4]
    assert [p.columns for p in found.train] == [{"answer": a} for a in "135"]
    assert [(p.id, p.columns["answer"]) for p in found.val] == [(0, "4"), (1, "2")]
    assert found.train_removed_as_held_out == 2
    with pytest.raises(ValueError, match="all 5 questions"):
        load(train, train)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K here")
def test_gsm8k_loads_whole():
    train, val = (
        Source(path=str(GSM8K / f"{name}.jsonl"), prompt_key="question", size=n)
        for name, n in (("train", 200), ("test", 100))
    )
    found = load(train, val, max_prompt_length=2048)
    assert (len(found.train), len(found.val)) == (200, 100)
    assert found.train[0].columns["answer"].endswith("#### 72")
    assert found.train[0].content[0]["content"] == found.train[0].columns["question"]


def make_batches(num_prompts, batch_size, seed=0, shuffle=True, tokens=(1,)):
    items = [
        Prompt(id=i, content="", tokens=(*tokens, i), columns={})
        for i in range(num_prompts)
    ]
    return stream.PromptBatches(items, batch_size, seed, shuffle)


def take(batches, count):
    return [[prompt.id for prompt in next(batches)] for _ in range(count)]


def test_without_shuffling_batches_follow_the_data():
    # Across the epoch the batch [4] is filled with the first others of the next one.
    assert take(make_batches(5, 2, shuffle=False), 4) == [
        [0, 1],
        [2, 3],
        [4, 0],
        [1, 2],
    ]
    # 3 and 4 already are in the second batch, so the next epoch begins with 0.
    batches = make_batches(5, 3, shuffle=False)
    assert take(batches, 2) == [[0, 1, 2], [3, 4, 0]]
    assert batches.epoch == 1 + 1 / 5


@pytest.mark.parametrize("size", [(5, 3), (7, 7), (8, 2), (7, 6), (100, 32)], ids=str)
def test_every_epoch_has_each_prompt_once_and_no_batch_one_twice(size):
    num_prompts, batch_size = size
    found = take(make_batches(num_prompts, batch_size), 10 * num_prompts)
    assert all(len(set(batch)) == len(batch) == batch_size for batch in found)
    dealt = [i for batch in found for i in batch]
    for start in range(0, len(dealt), num_prompts):
        assert Counter(dealt[start : start + num_prompts]) == Counter(
            range(num_prompts)
        )


def test_the_order_is_a_function_of_the_seed_and_changes_every_epoch():
    first, again, other = (take(make_batches(64, 32, seed=s), 4) for s in (1, 1, 2))
    assert first == again != other
    assert first[:2] != first[2:]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 40])
def test_after_restoring_the_same_batches_follow(count):
    batches = make_batches(7, 5, seed=3)
    take(batches, count)
    state = json.loads(json.dumps(batches.state()))
    rest = take(batches, 9)
    restored = make_batches(7, 5, seed=3)
    take(restored, 2)
    restored.restore(state)
    assert take(restored, 9) == rest
    assert restored.epoch == batches.epoch


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_prompts": 8}, "num_prompts was 7 and is now 8"),
        (
            {"tokens": (2,)},
            "tokens_sha256 was '[0-9a-f]{64}' and is now '[0-9a-f]{64}'",
        ),
        ({"batch_size": 4}, "batch_size was 5 and is now 4"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"shuffle": False}, "shuffle was True and is now False"),
    ],
)
def test_a_position_in_other_data_is_refused(change, message):
    state = make_batches(7, 5).state()
    other = make_batches(**{"num_prompts": 7, "batch_size": 5, **change})
    with pytest.raises(ValueError, match=message):
        other.restore(state)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="train_batch_size is 8 but there are 7"):
        make_batches(7, 8)


def test_held_out_questions_are_found_behind_other_prompts_and_templates(tmp_path):
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    asked = [
        [{"role": "system", "content": "x"}, {"role": "user", "content": " 3+1=\n"}],
        [{"role": "user", "content": [{"type": "text", "text": "1+1="}], "name": None}],
    ]
    rows = [{"prompt": content, "answer": ""} for content in asked]
    val = write(tmp_path / "b.jsonl", rows)
    behind = Source(
        path=train, system_prompt="Be brief.", prompt_template="Q: {prompt}"
    )
    for source in (train, behind):
        assert [p.id for p in load(source, val).train] == [0, 2, 4]
    only = Source(path=train, prompt_template="{prompt} {answer}")
    assert load(only, val).train_removed_as_held_out == 0


def test_a_row_with_a_token_beyond_the_vocabulary_is_named(tmp_path):
    rows = [*QUESTIONS[:2], {"prompt": "<|im_start|>", "answer": ""}]
    special = write(tmp_path / "a.jsonl", rows)
    plain = write(tmp_path / "b.jsonl", QUESTIONS[2:])
    fields = {"chat_template": False, "vocab_size": 258}
    message = "a.jsonl, row 2 .*token 258 .*vocabulary of 258; the tokenizer has 259"
    with pytest.raises(ValueError, match=message):
        load(special, plain, **fields)
    with pytest.raises(ValueError, match=message):
        load(plain, special, **fields)
    assert load(plain, None, **fields).train


def test_a_question_that_was_rendered_before_is_pointed_at(tmp_path):
    rows = [QUESTIONS[0], {"prompt": "<|im_start|>user\nhi<|im_end|>", "answer": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    (said,) = load(path).warnings
    assert "row 1" in said
    assert "set data.chat_template: false" in said
    assert load(path, chat_template=False).warnings == ()
    assert load(write(tmp_path / "b.jsonl", QUESTIONS)).warnings == ()


def test_tools_of_a_row_stand_in_its_prompt(tmp_path):
    tool = {"type": "function", "function": {"name": "add"}}
    rows = [QUESTIONS[0], QUESTIONS[1] | {"tools": json.dumps([tool])}]
    tokenizer = tiny.tokenizer("{{ tools | tojson }}" + tiny.CHAT_TEMPLATE)
    found = load(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer).train
    texts = [tokenizer.decode(prompt.tokens) for prompt in found]
    assert ['"name": "add"' in text for text in texts] == [False, True]
    with pytest.raises(ValueError, match="row 1 .*leaves out the column 'tools'"):
        load(write(tmp_path / "a.jsonl", rows))


def test_reward_functions_get_text_where_the_data_set_has_text(tmp_path):
    rows = [
        {"prompt": "1+1=", "answer": "2"},
        {"prompt": [{"role": "user", "content": "1+1= "}], "answer": "2"},
    ]
    source = Source(path=write(tmp_path / "a.jsonl", rows), system_prompt="Add.")
    text, messages = load(source).train
    assert text.content[1]["content"] == text.for_rewards == "1+1="
    assert messages.for_rewards == messages.content
    assert messages.content[0] == {"role": "system", "content": "Add."}


def test_further_held_out_sets_are_told_apart(tmp_path):
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    rows = [{"prompt": f"{i}-1=", "answer": ""} for i in range(3)]
    val = write(tmp_path / "b.jsonl", [*rows, QUESTIONS[0]])
    more = {
        "sums": Source(path=write(tmp_path / "c.jsonl", QUESTIONS[2:4])),
        "again": Source(path=write(tmp_path / "d.jsonl", rows[:1]), system_prompt="x"),
    }
    found = load(train, val, more_val=more)
    assert [p.id for p in found.train] == [1, 4]
    assert found.train_removed_as_held_out == 3
    assert [p.id for p in found.val] == list(range(7))
    names = [p.columns.get("data_source") for p in found.val]
    assert names == [None] * 4 + ["sums"] * 2 + ["again"]
    assert found.val[4].content[0]["content"] == QUESTIONS[2]["prompt"]
    assert found.val[:4] == load(train, val).val


def test_further_training_sets_are_joined(tmp_path):
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    rows = [{"prompt": f"{i}-1=", "answer": "", "level": 1} for i in range(3)]
    more = {"minus": Source(path=write(tmp_path / "b.jsonl", rows))}
    val = write(tmp_path / "c.jsonl", [QUESTIONS[4], rows[0]])
    found = load(train, val, more_train=more)
    assert [p.id for p in found.train] == [0, 1, 2, 3, 6, 7]
    assert found.train_removed_as_held_out == 2
    assert found.train[-1].columns == {"answer": "", "level": 1, "data_source": "minus"}
    assert found.train[:4] == load(train, val).train
    # A set may be held out whole, all of them may not.
    val = write(tmp_path / "c.jsonl", rows)
    assert [p.id for p in load(train, val, more_train=more).train] == list(range(5))
    val = write(tmp_path / "c.jsonl", [*rows, *QUESTIONS])
    with pytest.raises(ValueError, match="all 8 questions of .*a.jsonl, .*b.jsonl"):
        load(train, val, more_train=more)


def test_verls_parquet_needs_no_options(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"1 + {i}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(2)
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_rows(Source(path=str(path)))
    assert [row["answer"] for row in read] == ["1", "2"]
    assert read[1]["extra_info"] == {"split": "train", "index": 1}
    with pytest.raises(ValueError, match="no column 'gold'"):
        read_rows(Source(path=str(path), answer_key="gold"))


@pytest.mark.parametrize("text", ["Let us play:", ""])
def test_episodes_differ_in_the_seed_that_they_begin_from(text):
    def source(seed, size=20):
        return Source(path=f"episodes:{text}", size=size, seed=seed)

    found = load(source(1), source(2, 5), max_prompt_length=40)
    seeds = [prompt.columns["seed"] for prompt in found.train]
    assert len(found.train) == len({*seeds}) == 20 and len(found.val) == 5
    assert {prompt.content[-1]["content"] for prompt in found.train} == {text}
    assert all(prompt.for_rewards == text for prompt in found.train)
    assert [p.columns["seed"] for p in load(source(1)).train] == seeds
    assert load(source(1), source(1, 5)).train_removed_as_held_out == 5
    with pytest.raises(ValueError, match="episodes:.*set `size`"):
        load(Source(path=f"episodes:{text}"))
