import json

import numpy as np
import pytest

from jaxrl_llm.data import prompt_file
from jaxrl_llm.data.types import Completion

CHAT = [{"role": "user", "content": "2+2?"}]


def completion(prompt_id, sample, text):
    return Completion(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.arange(3, dtype=np.int32),
        logprobs=np.zeros(3, np.float32),
        raw_logprobs=None,
        finish_reason="length",
        weight_version=0,
        text=text,
    )


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    (tmp_path / "p.txt").write_text("1+1=\n{2}\n")
    rows = prompt_file.read(tmp_path / "p.txt")
    assert rows == [{"prompt": "1+1="}, {"prompt": "{2}"}]


def test_what_is_written_has_the_columns_that_were_read(tmp_path):
    asked = [{"prompt": "1+1=", "answer": 2}, {"prompt": CHAT, "id": "b"}]
    rows = prompt_file.read(write(tmp_path / "p.jsonl", *asked))
    assert rows == asked
    groups = [
        [completion(0, 0, "two\n"), completion(0, 1, "\ud800")],
        [completion(1, 0, "4"), completion(1, 1, "5")],
    ]
    found = [json.loads(x) for x in prompt_file.lines(rows, groups).splitlines()]
    assert [(x["prompt_id"], x["sample"]) for x in found] == [
        *((0, 0), (0, 1), (1, 0), (1, 1)),
    ]
    assert found[0] == {
        "prompt": "1+1=",
        "answer": 2,
        "prompt_id": 0,
        "sample": 0,
        "completion": "two\n",
        "finish_reason": "length",
        "num_tokens": 3,
    }
    assert found[2]["prompt"] == CHAT and found[2]["id"] == "b"


@pytest.mark.parametrize(
    "row, said",
    [
        ({"question": "?"}, "row 1 (from 0): no column 'prompt'; it has ['question']"),
        ({"prompt": []}, "row 1 (from 0): column 'prompt' must be text or a list"),
        ({"prompt": "?", "sample": 1}, "column 'sample' has the name of what is"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, said):
    path = write(tmp_path / "p.jsonl", {"prompt": "ok"}, row)
    with pytest.raises(ValueError) as error:
        prompt_file.read(path)
    assert said in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "name, said",
    [
        ("there.jsonl", "exists; name another"),
        ("out.txt", "name a FILE.jsonl"),
        ("no/out.jsonl", "there is no folder"),
    ],
)
def test_completions_go_to_a_new_file_only(tmp_path, name, said):
    (tmp_path / "there.jsonl").touch()
    with pytest.raises(ValueError, match=said):
        prompt_file.check_writable(tmp_path / name)
    prompt_file.check_writable(tmp_path / "new.jsonl")
