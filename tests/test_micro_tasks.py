"""The tasks of MiMo-Micro: the same example every time, none of a test ever trained on, answers that fit the media."""

import io
import re

import av
import numpy as np
import pytest
from training_scene import write_checkpoint
from transformers import AutoProcessor

from modeling_mimo.training import ConversationCollator, micro_sounds
from modeling_mimo.training.micro_pictures import BOARD, CELL, COLOURS, PLACES, Thing, background, draw, thing
from modeling_mimo.training.micro_tasks import TASKS, conversation, example, is_right
from modeling_mimo.training.micro_texts import FACTS, sum_of, written_sum


def media_of(messages) -> list:
    parts = [part for message in messages for part in message["content"] if isinstance(part, dict)]
    return [part[part["type"]] for part in parts if part["type"] != "text"]


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_the_same_every_time_and_no_other(task):
    first, again, other = example(task, 7), example(task, 7), example(task, 8)
    assert (first["answer"], str(first["messages"])) == (again["answer"], str(again["messages"]))
    for one, two in zip(media_of(first["messages"]), media_of(again["messages"]), strict=True):
        assert np.array_equal(one, two)
    if media_of(first["messages"]):
        assert not np.array_equal(media_of(first["messages"])[0], media_of(other["messages"])[0])
    elif task not in ("fact", "tool"):
        assert first["messages"] != other["messages"]


@pytest.mark.parametrize("task", TASKS)
def test_its_own_answer_is_right_and_another_one_is_not(task):
    asked = example(task, 3)
    said = {"role": "assistant", "content": asked["answer"]}
    if TASKS[task].name == "tool":
        said = asked["reply"]
        assert not is_right(asked, {"role": "assistant", "content": asked["answer"]})
    assert is_right(asked, said)
    assert not is_right(asked, {"role": "assistant", "content": asked["answer"] + "x"})
    assert TASKS[task].choices == () or asked["answer"] in TASKS[task].choices


def test_held_out_sums_are_never_trained_on():
    trained = {sum_of(np.random.default_rng(seed), held_out=False) for seed in range(3000)}
    tested = {sum_of(np.random.default_rng(seed), held_out=True) for seed in range(1000)}
    assert not trained & tested
    assert len(tested) > 500


def test_a_written_sum_ends_with_the_tens_of_the_sum():
    for a, b in ((27, 45), (10, 10), (99, 99)):
        tens = re.findall(r"= (\d+)\.", written_sum(a, b))[-1]
        assert int(tens) == (a + b) // 10


def test_held_out_voices_are_never_trained_on(monkeypatch):
    spoken = []

    class Recording(np.ndarray):
        def __getitem__(self, key):
            spoken.append(key.start // int(micro_sounds.SLOT * micro_sounds.RATE))
            return np.asarray(super().__getitem__(key))

    whole = micro_sounds._recordings("cat").view(Recording)
    monkeypatch.setattr(micro_sounds, "_recordings", lambda text: whole)
    voices = {}
    for held_out in (False, True):
        spoken.clear()
        for seed in range(200):
            micro_sounds.word(np.random.default_rng(seed), "cat", held_out)
        voices[held_out] = set(spoken)
    assert len(voices[False]) == micro_sounds.VOICES - micro_sounds.HELD_OUT
    assert len(voices[True]) == micro_sounds.HELD_OUT
    assert not voices[False] & voices[True]


def test_a_thing_lies_in_its_cell_in_its_colour():
    random = np.random.default_rng(0)
    for cell in range(9):
        one = thing(random, cell, "square", "red")
        pixels = draw([one], background(random)).astype(int)
        assert one.place == PLACES[cell]
        rows, columns = np.nonzero(np.abs(pixels - COLOURS["red"]).sum(-1) < 90)
        assert len(rows) > 250
        # the middle of what is red
        assert (int(rows.mean()) // CELL, int(columns.mean()) // CELL) == divmod(cell, 3)


def test_a_thing_at_the_edge_is_cut_off_there():
    pixels = draw([Thing("circle", "white", BOARD - 3, 2, 10)], np.zeros((BOARD, BOARD, 3), np.float32))
    rows, columns = np.nonzero(pixels.sum(-1))
    assert (rows.min(), columns.max()) == (0, BOARD - 1)
    assert rows.max() <= 13


def test_notes_have_the_frequency_of_their_name():
    for name, frequency in micro_sounds.NOTES.items():
        samples = micro_sounds.note(np.random.default_rng(1), name)
        spectrum = np.abs(np.fft.rfft(samples))
        loudest = np.fft.rfftfreq(len(samples), 1 / micro_sounds.RATE)[spectrum.argmax()]
        # a quarter of the step to the next note
        assert abs(np.log2(loudest / frequency)) < 1 / 48


def test_a_clip_moves_when_and_where_its_answer_says():
    for number in range(6):
        asked = example("clip", number)
        motion, time = re.fullmatch(r"The \w+ \w+ moves (\w+) at 00:(\d\d)\.", asked["answer"]).groups()
        with av.open(io.BytesIO(media_of(asked["messages"])[0])) as container:
            decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        frames = [(seconds, pixels.astype(int)) for seconds, pixels in decoded]
        still = frames[0][1]
        moved = [seconds for seconds, pixels in frames if np.abs(pixels - still).max(-1).mean() > 2]
        assert moved[0] == pytest.approx(int(time), abs=0.01)
        # where things appear against where they were
        gone = np.abs(frames[-1][1] - still).max(-1) > 60
        appeared, left = (
            np.argwhere(gone & (frames[index][1].max(-1) > frames[other][1].max(-1))).mean(0)
            for index, other in ((-1, 0), (0, -1))
        )
        down, right = appeared - left
        upright, sideways = "down" if down > 0 else "up", "right" if right > 0 else "left"
        assert motion == (upright if abs(down) > abs(right) else sideways)


def test_the_key_lies_sixteen_windows_back_and_is_in_no_other_place():
    asked = example("key", 0)
    text = asked["messages"][0]["content"]
    assert text.count(asked["answer"]) == 1
    # words and stops are at least a token each
    assert len(re.findall(r"\w+|\.", text[text.index(asked["answer"]) :])) > 16 * 32


def test_conversations_of_training_can_be_collated(tmp_path):
    collator = ConversationCollator(AutoProcessor.from_pretrained(write_checkpoint(tmp_path / "model")))
    batch = collator([conversation(number) for number in range(12)])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert {"pixel_values", "audio_codes"} <= set(batch)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="`task`: expected one of shape, colour"):
        example("smell", 0)
    with pytest.raises(ValueError, match="`split`: expected one of train, test, got 'all'"):
        example("shape", 0, "all")


def test_facts_are_asked_in_different_words():
    assert len({question for question, _ in FACTS}) == len(FACTS)
