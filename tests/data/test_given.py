"""Questions that are handed over in memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.data import given


def rows(questions):
    return [json.loads(line) for line in given.json_lines(questions, "train")]


@pytest.mark.parametrize(
    "questions, expected",
    [
        ("a.jsonl", "a.jsonl"),
        (Path("a/b.parquet"), "a/b.parquet"),
        (["a.jsonl"], None),
    ],
)
def test_text_and_paths_are_paths(questions, expected):
    assert given.path_of(questions) == expected


def test_texts_are_questions_without_an_answer():
    assert rows(["1 + 1?", "2?"]) == [
        {"answer": None, "prompt": "1 + 1?"},
        {"answer": None, "prompt": "2?"},
    ]


def test_rows_may_hold_numpys_values():
    row = {"prompt": "p", "answer": np.int64(2), "levels": np.array([1.5, 2])}
    assert rows([row]) == [{"prompt": "p", "answer": 2, "levels": [1.5, 2.0]}]


def test_rows_of_verls_keep_their_answer():
    row = {"prompt": "p", "reward_model": {"ground_truth": "4"}}
    assert rows([row]) == [row]


def test_a_data_frames_rows_are_questions():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "prompt": ["a", "b"],
            "answer": [1.0, float("nan")],
            "when": pandas.to_datetime(["2025-01-31", None]),
            "tags": [["x"], np.array([1, 2])],
        },
        index=[7, 9],
    )
    assert rows(frame) == [
        {"prompt": "a", "answer": 1.0, "when": "2025-01-31T00:00:00", "tags": ["x"]},
        {"prompt": "b", "answer": None, "when": None, "tags": [1, 2]},
    ]
    twice = pandas.concat([frame, frame], axis="columns")
    with pytest.raises(ValueError, match="need different names"):
        rows(twice)


def test_a_dataset_is_its_rows_and_a_dictionary_of_them_is_none():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "a", "answer": 1}])
    assert rows(data) == [{"prompt": "a", "answer": 1}]
    with pytest.raises(ValueError, match=r"train is a datasets.DatasetDict of \['t'\]"):
        rows(datasets.DatasetDict({"t": data}))
    with pytest.raises(ValueError, match="may have no end; give so many of its rows"):
        rows(data.to_iterable_dataset())


@pytest.mark.parametrize(
    "questions, message",
    [
        ({"prompt": ["a"]}, r"train is a builtins.dict; give a path, or a list"),
        (iter(["a"]), "train is a builtins.list_iterator; give a path"),
        (["a", 1], r"train row 1: expected {'prompt': ...}, got 1"),
        ([{"prompt": {1}}], "train row 0 is not JSON: Object of type set is no"),
    ],
)
def test_what_are_no_questions_is_said(questions, message):
    with pytest.raises(ValueError, match=message):
        rows(questions)
