"""`mimo bench --micro`: what it counts, its intervals and losses, and what it prints."""

import argparse
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_mimo import micro
from modeling_mimo.cli import bench_micro
from modeling_mimo.cli.bench_micro import Score, evaluate, expected_loss, numbered, pooled, responses, wilson
from modeling_mimo.cli.main import main
from modeling_mimo.training import ConversationCollator
from modeling_mimo.training.micro_tasks import TASKS, example, is_right


pytestmark = pytest.mark.usefixtures("one_thread")

# with a picture, a clip with sound, thinking, and tools
MIXED = ("shape", "match", "sum", "tool")
TOKENS = 12
QUICK = ["--count", "2", "--new-tokens", str(TOKENS), "--device-map", "cpu"]


@pytest.fixture(scope="module")
def loaded():
    """Model and processor; float32, where batches round as single answers do."""
    return AutoModelForCausalLM.from_pretrained(micro(), dtype=torch.float32), AutoProcessor.from_pretrained(micro())


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 10), (8, 10), (10, 10), (93, 100), (1, 1), (399, 400)])
def test_the_ends_of_an_interval_are_shares_that_the_count_just_allows(right, count):
    """The definition: a true share is inside if what was found is at most 1.96 of its standard errors away."""
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / count)
            assert abs(right / count - end) / error == pytest.approx(1.959964, abs=1e-6)
    assert (low, high) == pytest.approx([1 - end for end in wilson(count - right, count)][::-1])


def test_an_interval_is_of_a_share():
    assert wilson(0, 7)[0] == 0
    assert wilson(7, 7)[1] == 1
    for right, count in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="`right`: expected"):
            wilson(right, count)


def test_a_batch_of_different_tasks_is_answered_as_one_by_one(loaded):
    asked = [example(task, number) for number in range(2) for task in MIXED]
    alone = [responses(*loaded, [one], TOKENS)[0] for one in asked]
    assert responses(*loaded, asked, TOKENS) == alone
    # the thinking of the sums is taken apart from the answer
    assert ["reasoning_content" in answer for answer in alone[: len(MIXED)]] == [task == "sum" for task in MIXED]


def test_right_answers_are_counted_whatever_the_batch(loaded):
    scores = [evaluate(*loaded, ("shape", "tool"), 5, size, seed=3, max_new_tokens=TOKENS) for size in (2, 5)]
    assert scores[0] == scores[1]
    for task, score in scores[0].items():
        asked = [example(task, numbered(3, number)) for number in range(5)]
        assert score.right == sum(map(is_right, asked, responses(*loaded, asked, TOKENS)))
        assert score.count == 5
        assert score.loss is None


def test_the_loss_is_that_of_the_expected_tokens_alone_whatever_the_batch(loaded):
    model, processor = loaded
    collator = ConversationCollator(processor)
    asked = [example(task, 7) for task in MIXED]
    nats, tokens = expected_loss(model, collator, asked)
    expected = 0.0
    for one in asked:
        batch = collator([{**one, "messages": [*one["messages"], one["reply"]]}])
        places = (batch["labels"][0] != -100).nonzero()[:, 0]
        with torch.no_grad():
            chances = model(**{**batch, "labels": None}).logits[0].log_softmax(-1)
        expected -= sum(float(chances[place - 1, batch["input_ids"][0, place]]) for place in places)
        tokens -= len(places)
    assert tokens == 0
    assert nats == pytest.approx(expected, rel=1e-4)
    score = evaluate(model, processor, ("shape",), 3, 2, with_loss=True, max_new_tokens=1)["shape"]
    assert score.nats == pytest.approx(
        sum(expected_loss(model, collator, [example("shape", numbered(0, number))])[0] for number in range(3)),
        rel=1e-4,
    )


def test_scores_of_tasks_add_up():
    total = pooled([Score(10, 9, 2.0, 20), Score(30, 15, 4.0, 10)])
    assert (total.accuracy, total.loss) == (0.6, 0.2)


def test_a_column_per_precision(capsys):
    options = ["--task", "shape", "--task", "tool", *QUICK]
    assert main(["bench", "--micro", "--precision", "fp8,bf16,nf4", "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["count"], result["columns"]) == (micro(), 2, ["fp8", "bf16", "nf4"])
    assert [row["name"] for row in result["tasks"]] == ["shape", "tool"]
    for row in result["tasks"]:
        assert row["chance"] == TASKS[row["name"]].chance
        for score in row["scores"].values():
            assert score["low"] <= score["accuracy"] <= score["high"]
            assert score["passes"] == (None if row["bar"] is None else score["accuracy"] >= row["bar"])
    losses = {name: score["loss"] for name, score in result["all"].items()}
    # the same numbers, dequantized at use or before
    assert losses["fp8"] == losses["bf16"] != losses["nf4"]


def result_of(*scores):
    """What `mimo bench --micro --json` prints of columns with these scores of the task "shape"."""
    columns = {f"c{index}": score for index, score in enumerate(scores)}
    return {
        "model": "m",
        "parameters": 1,
        "count": 10,
        "seed": 0,
        "columns": list(columns),
        "tasks": [bench_micro.task_row(TASKS["shape"], columns)],
        "all": {name: bench_micro.score_row(score) for name, score in columns.items()},
        "mtp": None,
    }


def test_the_last_line_names_the_bars_that_were_missed():
    lines = bench_micro.as_text(result_of(Score(10, 8))).splitlines()
    assert lines[-1] == "bars missed: shape 80.0 of 90.0"
    assert lines[4].split()[:5] == ["shape", "80.0", "49.0", "-", "94.3"]
    assert "NO" in lines[4]
    assert lines[4].endswith(TASKS["shape"].about)
    assert bench_micro.as_text(result_of(Score(10, 9))).splitlines()[-1] == "bars missed: none"
    lines = bench_micro.as_text(result_of(Score(10, 9, 1.0, 4), Score(10, 7, 2.0, 4))).splitlines()
    assert [line for line in lines if "missed" in line] == [
        "bars missed in c0: none",
        "bars missed in c1: shape 70.0 of 90.0",
    ]
    assert lines[4].split()[1:9] == ["90.0", "59.6", "-", "98.2", "0.250", "70.0", "39.7", "-"]


def test_drafting_is_measured_on_long_answers_and_texts(tmp_path, capsys):
    text = tmp_path / "own.txt"
    text.write_text("Once there was a fox called Tom. " * 30)
    options = ["--mtp", "--text", str(text), "--task", "fact", "--json", *QUICK]
    assert main(["bench", "--micro", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["mtp"]
    assert [row["text"] for row in rows] == ["story", "fact", "own.txt"]
    for row in rows:
        assert row["same_tokens"]
        assert row["prompts"] == 2
        assert 2 <= row["tokens"] <= 2 * TOKENS
        assert 1 <= row["mean_accepted_length"] <= 4
        assert all(done <= asked for done, asked in zip(row["accepted"], row["proposed"], strict=True))
        assert row["plain_tokens_per_second"] > 0
    lines = bench_micro.drafting_table(rows)
    assert sum(line.endswith(" the same") for line in lines) == 3
    lines = bench_micro.drafting_table([{**row, "same_tokens": False} for row in rows])
    assert sum(line.endswith(" NOT the same") for line in lines) == 3


def test_wrong_input_is_named_in_one_line(checkpoints, tmp_path, capsys):
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    bad = {
        "`PATH`: expected a checkpoint, got none": [],
        "`--count`: expected --micro with it": [micro(), "--count", "3"],
        "`--count`: expected at least 1, got 0": ["--micro", "--count", "0"],
        "`--seed`: expected at least 0, got -1": ["--micro", "--seed", "-1"],
        "`--task`: expected some of shape, colour": ["--micro", "--task", "smell"],
        "`--temperature`: expected 0 with --micro": ["--micro", "--temperature", "0.5"],
        "`--precision`: expected some of fp8, bf16, nf4, got 'int3'": ["--micro", "--precision", "bf16,int3"],
        "`--precision`: expected neither --dtype": ["--micro", "--precision", "fp8", "--dtype", "float32"],
        "`--compare`: expected --precision with it": ["--micro", "--compare", micro()],
        "`--repeats`: expected none with --micro": ["--micro", "--repeats", "3"],
        "expected a checkpoint that sees and hears": ["--micro", str(checkpoints["fp8_fused"])],
        "llama: expected a MiMo-V2 checkpoint, got one of llama": ["--micro", str(llama)],
        "of llama.": [str(llama)],
        "expected a folder with config.json": ["--micro", "--precision", "fp8", "--compare", "/"],
    }
    for message, arguments in bad.items():
        assert main(["bench", *arguments]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="`--precision`: expected bf16 or nf4 for m, whose weights are not FP8"):
        bench_micro.chosen_columns(
            argparse.Namespace(path="m", precision="fp8", compare=[], dtype="auto", fp8_resident=False), is_fp8=False
        )
