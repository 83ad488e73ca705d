"""Expected values are worked by hand in the comments, or say where they are from."""

import dataclasses
import json
import types

import numpy as np
import pytest

from jaxrl_llm.config import parsing
from jaxrl_llm.data.types import Completion, Episode, Prompt, Scores, Turn
from jaxrl_llm.sharding import hardware
from jaxrl_llm.tracking import performance, run_directory, step_metrics


def writer(run_dir, *names):
    return run_directory.MetricsWriter(run_dir, names, "project", {"seed": 3})


def episode(prompt_id, sample, length, reason="stop"):
    made = Completion(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.arange(length, dtype=np.int32),
        logprobs=np.zeros(length, np.float32),
        raw_logprobs=np.zeros(length, np.float32),
        finish_reason=reason,
        weight_version=7,
        text=f"reply {prompt_id}.{sample}",
    )
    return Episode.of(made)


def prompt(id, content="2+2?", tokens=(1, 2, 3), **columns):
    return Prompt(id=id, content=content, tokens=tokens, columns=columns)


PROMPTS = [prompt(5, answer="4"), prompt(6, tokens=(1,), answer="4")]
EPISODES = [
    [episode(5, 0, 2), episode(5, 1, 6, "length")],
    [episode(6, 0, 3), episode(6, 1, 1)],
]
SCORES = Scores(
    total=np.array([[1, 0], [2, 2]], np.float32),
    by_function={
        "exact": np.array([[1, 0], [1, 1]], np.float32),
        "style": np.array([[np.nan, 0], [np.nan, 1]], np.float32),
        "idle": np.full((2, 2), np.nan, np.float32),
    },
    errors={"exact": 0, "style": 2, "idle": 0},
)


def test_what_is_written_is_read_back(tmp_path):
    with writer(tmp_path) as w:
        w.write(0, {"val": 0.25})
        w.write(1, {"loss": np.float32(0.5), "count": 3, "bad": float("nan")})
        # Flushed: another reader sees it before the file is closed.
        assert run_directory.read(tmp_path) == [
            {"step": 0, "val": 0.25},
            {"step": 1, "loss": 0.5, "count": 3.0, "bad": None},
        ]
    columns = run_directory.table(tmp_path)
    np.testing.assert_array_equal(columns["step"], [0, 1])
    np.testing.assert_array_equal(columns["val"], [0.25, np.nan])
    np.testing.assert_array_equal(columns["loss"], [np.nan, 0.5])
    np.testing.assert_array_equal(columns["bad"], [np.nan, np.nan])
    assert run_directory.table([])["step"].shape == (0,)


def test_the_table_fits_into_pandas(tmp_path):
    pytest.importorskip("pandas")
    frame = run_directory.to_pandas(
        [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    )
    assert frame["loss"].to_dict() == {2: 0.5, 4: 0.25}


def test_a_line_torn_by_a_killed_process_is_dropped(tmp_path):
    with writer(tmp_path) as w:
        w.write(1, {"loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in run_directory.read(tmp_path)] == [1]
    with writer(tmp_path) as w:
        w.write(2, {"loss": 0.25})
    assert [line["step"] for line in run_directory.read(tmp_path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        run_directory.read(tmp_path)
    with writer(tmp_path):  # what is torn was said before, see `whole`
        assert [line["step"] for line in run_directory.read(tmp_path)] == [1, 3]


LINES = [f'{{"step": {step}}}\n' for step in range(5)]


@pytest.mark.parametrize(
    "lines, step, fault",
    [
        (LINES, 4, None),
        ([], -1, None),
        ([*LINES, '{"st'], 4, "line 6 is torn behind step 4"),
        ([*LINES[:2], "null\n", *LINES[3:]], 1, "line 3 is torn behind step 1: 'null'"),
        ([*LINES[:3], *LINES[4:]], 2, "line 4 has step 4 where step 3 is missing"),
        ([*LINES[:4], *LINES[3:]], 2, "line 5 has step 3 a second time"),
        ([*LINES, *LINES[2:]], 1, "line 6 has step 2 a second time"),
    ],
)
def test_what_is_whole_is_every_step_once(tmp_path, lines, step, fault):
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with writer(tmp_path / "other") as w:
        for s in range(5):
            w.write_rollouts(s, "train", [{}])
    (tmp_path / "other/rollouts").rename(tmp_path / "rollouts")
    found = run_directory.whole(tmp_path)
    assert found.step == step
    assert [fault in text for text in found.faults] == ([True] if fault else [])
    assert found.last == (4 if lines else -1)


def test_responses_that_are_missing_or_torn_are_not_whole(tmp_path):
    with writer(tmp_path) as w:
        for step in range(5):
            w.write(step, {})
            w.write_rollouts(step, "train", [{"text": "a"}])
    assert run_directory.whole(tmp_path) == (4, 4, [])
    last = tmp_path / "rollouts/train_000004.jsonl"
    last.write_text(last.read_text()[:-1])
    step, _, (fault,) = run_directory.whole(tmp_path)
    assert step == 3 and fault == f"{last} is torn"
    (tmp_path / "rollouts/train_000002.jsonl").unlink()
    step, _, (fault,) = run_directory.whole(tmp_path)
    assert step == 1 and fault.endswith("train_000002.jsonl is missing")
    # Behind what is looked for, they may have been cleared away.
    assert run_directory.whole(tmp_path, 2).step == 3
    (tmp_path / "metrics.jsonl").unlink()
    assert run_directory.whole(tmp_path).faults == [
        f"{tmp_path / 'metrics.jsonl'} is missing"
    ]


def test_no_metrics_at_all_is_an_error_that_names_the_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*a run directory"):
        run_directory.read(tmp_path / "nowhere")


def test_rewind_drops_what_is_later_and_keeps_the_rest(tmp_path):
    with writer(tmp_path) as w:
        for step in range(4):
            w.write(step, {"loss": float(step)})
            w.write_rollouts(step, "train", [{"step": step}])
        w.write_rollouts(2, "val", [])
        w.rewind(1)
        assert [line["step"] for line in run_directory.read(tmp_path)] == [0, 1]
        assert [(s, n) for s, n, _ in run_directory.rollout_files(tmp_path)] == [
            (0, "train"),
            (1, "train"),
        ]
        w.write(2, {"loss": 9.0})
    assert run_directory.read(tmp_path)[-1] == {"step": 2, "loss": 9.0}
    with writer(tmp_path) as w:
        w.rewind(-1)
    assert run_directory.read(tmp_path) == []
    assert run_directory.rollout_files(tmp_path) == []


def test_a_step_is_written_once(tmp_path):
    with writer(tmp_path) as w:
        w.write(3, {})
        with pytest.raises(ValueError, match="ends with step 3, got step 3"):
            w.write(3, {})
    with writer(tmp_path) as w, pytest.raises(ValueError, match="got step 2"):
        w.write(2, {})


def test_a_metric_that_is_not_one_number_is_an_error_that_names_it(tmp_path):
    with writer(tmp_path) as w, pytest.raises(ValueError, match="'loss' must be one"):
        w.write(1, {"loss": np.zeros(2)})


def test_a_rollout_file_is_written_whole_or_not_at_all(tmp_path):
    with writer(tmp_path) as w:
        w.write_rollouts(12, "train", [{"text": "a\u2028b\ud800"}, {"text": "c"}])
        with pytest.raises(TypeError):
            w.write_rollouts(12, "train", [{"text": "new"}, {"text": object()}])
    path = tmp_path / "rollouts" / "train_000012.jsonl"
    lines = path.read_text().split("\n")
    assert [json.loads(line)["text"] for line in lines[:-1]] == ["a\u2028b\ud800", "c"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path):
    left = [".config.yaml.17.tmp", "rollouts/.train_000002.jsonl.17.tmp"]
    (tmp_path / "rollouts").mkdir()
    for name in left:
        (tmp_path / name).write_text('{"st')
    with writer(tmp_path):
        assert not [name for name in left if (tmp_path / name).exists()]


def test_a_damaged_completion_is_an_error_that_names_file_and_line(tmp_path):
    path = tmp_path / "train_000001.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    with pytest.raises(ValueError, match=f"{path}, line 2: not JSON: "):
        run_directory.completions(path)


def test_the_run_directory_says_what_ran_and_where(tmp_path):
    dataset = {"path": "x.jsonl"}
    cfg = parsing.parse(
        {
            "output_dir": str(tmp_path),
            "model": {"path": "mödel"},
            "data": {"train": dataset},
            "rollout": {"stop": ["\n\n"]},
            "reward": {"functions": [{"name": "exact"}]},
            "trainer": {"total_training_steps": 3},
        },
        "test",
    )
    run_directory.MetricsWriter(tmp_path, [], "p", cfg.model_dump(mode="json")).close()
    assert parsing.load(tmp_path / "config.yaml") == cfg
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["platform"] == "cpu" and found["num_devices"] == 8
    assert {"python", "jax", "flax", "optax", "jaxrl-llm", "git_commit"} <= set(found)


def test_batch_metrics_by_hand():
    advantages = np.array([[0.5, -0.5], [0, 0]])
    found = step_metrics.batch_metrics(PROMPTS, EPISODES, SCORES, advantages)
    assert found == {
        "critic/rewards/mean": 1.25,  # (1 + 0 + 2 + 2) / 4
        "critic/rewards/max": 2.0,
        "critic/rewards/min": 0.0,
        "critic/score/mean": 1.25,
        "critic/advantages/mean": 0.0,
        "critic/advantages/max": 0.5,
        "critic/advantages/min": -0.5,
        "response_length/mean": 3.0,  # (2 + 6 + 3 + 1) / 4
        "response_length/max": 6.0,
        "response_length/min": 1.0,
        "response_length/clip_ratio": 0.25,  # one of four
        "prompt_length/mean": 2.0,  # (3 + 1) / 2
        "prompt_length/max": 3.0,
        "prompt_length/min": 1.0,
        "training/groups_all_equal": 0.5,  # the second group
        "reward/exact/mean": 0.75,
        "reward/style/mean": 0.5,  # of the two it judged
        "reward_errors/style": 2.0,
    }


def test_the_kept_mass_is_over_the_tokens_that_know_it():
    def kept(*mass):
        turn = EPISODES[1][0].turns[0]
        known = dataclasses.replace(turn, kept_mass=np.array(mass, np.float32))
        return dataclasses.replace(EPISODES[1][0], turns=(known,))

    def found(one):
        episodes = [EPISODES[0], [one, EPISODES[1][1]]]
        return step_metrics.batch_metrics(PROMPTS, episodes, SCORES, SCORES.total)

    metrics = found(kept(0.5, 1.0, np.nan))
    assert metrics["rollout/kept_mass_mean"] == 0.75
    assert metrics["rollout/kept_mass_min"] == 0.5
    assert "rollout/kept_mass_mean" not in found(kept(np.nan, np.nan, np.nan))


def test_rollout_records_hold_one_completion_each():
    records = step_metrics.rollout_records(
        12, "train", "train", PROMPTS, EPISODES, SCORES, advantage=SCORES.total / 2
    )
    assert [(r["prompt_id"], r["sample"]) for r in records] == [
        (5, 0),
        (5, 1),
        (6, 0),
        (6, 1),
    ]
    assert records[1] == {
        "step": 12,
        "split": "train",
        "kind": "train",
        "prompt_id": 5,
        "sample": 1,
        "prompt": "2+2?",
        "content": "2+2?",
        "completion": "reply 5.1",
        "answer": "4",
        "reward": 0.0,
        "scores": {"exact": 0.0, "style": 0.0, "idle": None},
        "advantage": 0.0,
        "finish_reason": "length",
        "num_tokens": 6,
        "tokens": [0, 1, 2, 3, 4, 5],
        "weight_version": 7,
    }
    json.dumps(records, allow_nan=False)


def test_the_question_of_a_chat_is_its_last_user_message():
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
        {"role": "assistant", "content": "<think>"},
    ]
    assert step_metrics.last_user_message(prompt(1, chat)) == "second"
    assert step_metrics.last_user_message(prompt(1, chat[:1])) == "be brief"


def test_the_accuracy_to_show_is_greedy_if_there_is_one():
    names = ["loss", "val-core/a/acc/mean@4/ci95_low", "val-core/a/acc/mean@4"]
    assert step_metrics.accuracy_name(names) == "val-core/a/acc/mean@4"
    assert step_metrics.accuracy_name([*names, "val-core/a/acc/greedy"]) == (
        "val-core/a/acc/greedy"
    )
    assert step_metrics.accuracy_name(["loss"]) is None


def test_timer_adds_up_phases(monkeypatch):
    # Made at 0; gen 1..4 and 5..6; read at 10.
    clock = iter([0.0, 1.0, 4.0, 5.0, 6.0, 10.0])
    # Not of the module `time` itself, which other threads read too.
    mine = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(performance, "time", mine)
    timer = performance.Timer()
    with timer("gen"):
        pass
    with timer("gen"):
        pass
    assert timer.metrics() == {
        "timing_s/gen": 4.0,
        "timing_s/step": 10.0,
        "perf/compilations": 0.0,
    }


def test_throughput_is_per_second_and_device():
    assert performance.throughput(1200, 3.0, 4) == {
        "perf/total_num_tokens": 1200.0,
        "perf/time_per_step": 3.0,
        "perf/throughput": 100.0,
    }


def test_train_flops_is_verls_number():
    # Qwen3-8B on sequences of 512, 1024 and 2048 tokens; veRL 0.9.1's flops counter
    # gives 180.997438046208 TFLOP. Weights per layer: q and o 4096 x 4096, k and v
    # 4096 x 1024, three of 4096 x 12288; embedding and output 151936 x 4096 each.
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    found = performance.train_flops(
        num_params_matmul=36 * layer + 2 * 151936 * 4096,
        num_tokens=512 + 1024 + 2048,
        sum_of_squared_lengths=512**2 + 1024**2 + 2048**2,
        layers=36,
        heads=32,
        head_dim=128,
    )
    assert found == pytest.approx(180.997438046208e12, rel=1e-12)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
        ("NVIDIA H20", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_flops_of_known_devices_only(kind, peak):
    assert hardware.peak_flops(kind) == peak


def test_mfu_is_left_out_where_the_peak_is_not_known():
    # 2 devices could have done 2 * 312e12 in one second.
    kind = "NVIDIA A100-SXM4-80GB"
    assert performance.mfu(312e12, 1.0, hardware.peak_flops(kind), 2) == {
        "perf/mfu/actor": 0.5
    }
    assert performance.mfu(1e12, 1.0, hardware.peak_flops("cpu"), 8) == {}


def test_a_record_of_several_turns_has_all_that_follows_the_prompt():
    answer = Turn.observed("tool", [8, 9], "42")
    first = EPISODES[0][0]
    several = dataclasses.replace(first, turns=(*first.turns, answer, *first.turns))
    episodes = [[several, EPISODES[0][1]], EPISODES[1]]
    record, *_ = step_metrics.rollout_records(
        12, "train", "train", PROMPTS, episodes, SCORES
    )
    assert record["tokens"] == [0, 1, 8, 9, 0, 1] and record["num_tokens"] == 6
    assert record["completion"] == "reply 5.042reply 5.0"
    assert record["finish_reason"] == "stop" and record["weight_version"] == 7
    found = step_metrics.batch_metrics(PROMPTS, episodes, SCORES, SCORES.total)
    assert found["response_length/mean"] == (4 + 6 + 3 + 1) / 4
    read, new = step_metrics.num_tokens(PROMPTS, episodes)
    before = step_metrics.num_tokens(PROMPTS, EPISODES)
    assert (read, new) == (before[0] + 2, before[1] + 2)  # two read, two sampled
    begun = dataclasses.replace(several, opening_tokens=(1, 2, 3, 4, 5, 6, 7))
    longer = len(begun.opening_tokens) - len(PROMPTS[0].tokens)
    again = step_metrics.num_tokens(PROMPTS, [[begun, episodes[0][1]], episodes[1]])
    assert again == (read + longer, new)
