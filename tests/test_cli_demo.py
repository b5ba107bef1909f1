import contextlib
import io
import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from modeling_mimo.cli import demo_screen
from modeling_mimo.cli.main import main
from modeling_mimo.training.micro_tasks import example, is_right


pytestmark = pytest.mark.usefixtures("one_thread")

MEDIA = Path(__file__).parents[1] / "examples" / "media"
SHIPPED = Path(str(files("modeling_mimo") / "data" / "media"))


@pytest.fixture(scope="module")
def listed():
    return json.loads((SHIPPED / "media.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(one_thread):
    """The object of `mimo demo --json` with a chart beside what is shipped."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["demo", "--json", "--max-new-tokens", "64", "--image", str(MEDIA / "chart.png")]) == 0
    return json.loads(out.getvalue())


def test_it_asks_about_every_shipped_medium_and_the_users_file(measured, listed):
    rows = measured["questions"]
    assert [row["file"] for row in rows] == [entry["file"] for entry in listed["questions"]] + ["chart.png"]
    kinds = {kind for row in rows for kind in row["media_tokens"]}
    assert kinds == {"image", "video", "audio"}
    # a clip with sound has both in one question
    assert any({"video", "audio"} <= set(row["media_tokens"]) for row in rows)
    assert [row["label"] for row in rows if row["tool_calls"]] == ["tool"]
    assert rows[-1]["expected"] is rows[-1]["right"] is None


def test_right_is_what_the_model_answers_and_the_file_shows(measured, listed):
    for row, entry in zip(measured["questions"], listed["questions"]):
        calls = [{"type": "function", "function": call} for call in row["tool_calls"]]
        assert row["right"] is is_right(entry, {"content": row["answer"], "tool_calls": calls})
        assert row["expected"] == entry["answer"]


def test_most_shipped_questions_are_answered_right(measured):
    right = [row["right"] for row in measured["questions"][:-1]]
    assert len(right) == 8
    # other processors round otherwise
    assert sum(right) >= 6


def test_the_cache_of_the_far_key_is_smaller_than_if_all_layers_were_global(measured):
    longest = max(measured["questions"], key=lambda row: row["prompt_tokens"])
    assert longest["label"] == "far key"
    held = measured["cache"]["bytes"]
    assert measured["cache"]["tokens"] == longest["prompt_tokens"] + longest["answer_tokens"] - 1
    assert held["total"] == held["full_attention"] + held["sliding_attention"]
    assert held["total"] < measured["cache"]["bytes_all_global"] / 2


def test_drafting_counts_fit_together(measured):
    drafting = measured["drafting"]
    assert len(drafting["proposed"]) == 3
    assert all(0 <= done <= asked for done, asked in zip(drafting["accepted"], drafting["proposed"]))
    assert 1 <= drafting["mean_accepted_length"] <= 4
    assert drafting["tokens"] > 20 * drafting["texts"]
    assert drafting["mean_accepted_length"] > 2


def test_it_fits_on_one_screen_even_if_every_answer_is_wrong(measured):
    rows = [row | {"right": False} for row in measured["questions"][:-1]]
    parts = [demo_screen.header(measured["model"]), *map(demo_screen.row, rows)]
    parts += [demo_screen.drafting(measured["drafting"]), demo_screen.footer(measured)]
    lines = "\n".join(parts).split("\n")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    assert sum("expected:" in line for line in lines) == len(rows)


def test_the_screen_shows_each_question_and_the_users_text(measured, tmp_path, capsys):
    text = tmp_path / "keys.txt"
    text.write_text("The key of Tom is 123.", encoding="utf-8")
    options = ["--text", str(text), "--ask", "What is the key of Tom?", "--max-new-tokens", "4"]
    assert main(["demo", *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MiMo-Micro: ")
    for row in measured["questions"][:-1]:
        assert demo_screen.row(row).split("\n")[0] in out
    assert "keys.txt: What is the key of Tom?" in out
    assert "accepted length" in out
    assert "KV cache" in out


def test_shipped_media_are_the_held_out_examples_they_are_said_to_be(listed):
    for entry in [*listed["questions"], *listed["drafting"]]:
        drawn = example(entry["task"], entry["number"])
        assert entry["answer"] == drawn["answer"]
        content = drawn["messages"][0]["content"]
        if entry["file"] is None:
            assert entry["messages"] == drawn["messages"]
            continue
        medium, words = content
        assert entry["question"] == words["text"]
        path = SHIPPED / entry["file"]
        if medium["type"] == "image":
            np.testing.assert_array_equal(np.asarray(Image.open(path)), medium["image"])
        elif medium["type"] == "audio":
            samples, rate = soundfile.read(path)
            assert rate == medium["sampling_rate"]
            # 16 bits
            np.testing.assert_allclose(samples, medium["audio"], atol=2**-15)
        else:
            # encoders differ from version to version
            assert path.stat().st_size == pytest.approx(len(medium["video"]), rel=0.5)


def test_shipped_media_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 150_000


def test_random_weights_read_see_and_hear(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A short text to go on with.", encoding="utf-8")
    options = ["--random", "--size", "tiny", "--max-new-tokens", "4", "--text", str(text)]
    media = ["--image", str(MEDIA / "chart.png"), "--video", str(MEDIA / "clip.mp4")]
    media += ["--audio", str(MEDIA / "speech.wav"), "--audio", str(MEDIA / "sweep.ogg")]
    assert main(["demo", *options, *media]) == 0
    out = capsys.readouterr().out
    assert "loaded MiMoV2ForCausalLM and MiMoV2Processor" in out
    # 640 x 448 and 320 x 192 pixels in patches of 16 x 16, four of them a token; at least 8 frames, in pairs
    assert "chart.png: 1 x 28 x 40 patches, 280 tokens" in out
    assert "clip.mp4: 4 x 12 x 20 patches, 240 tokens" in out
    assert "What is in the image and the video and the audio?" in out
    for segment in ("images[0]", "videos[0] pair 0", "videos[0] pair 3", "audio[0]", "audio[1]"):
        assert segment in out
    assert out.count("KV cache for ") == 2
    assert "noise" in out


def test_random_weights_need_no_file_of_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--random", "--size", "tiny", "--max-new-tokens", "2", "--keep", "kept"]) == 0
    out = capsys.readouterr().out
    assert out.count("KV cache for ") == 1
    assert "images[0]" not in out
    assert (tmp_path / "kept" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "`--max-new-tokens`: expected at least 1, got 0"),
        (["--image", "missing.png"], "`--image`: expected a file or URL, got missing.png"),
        (["--image", __file__], "test_cli_demo.py: images[0]: expected an image file"),
        (["--audio", __file__], "test_cli_demo.py: audio[0]: "),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", str(MEDIA / "chart.png")], "`--text`: expected a UTF-8 text file"),
        (["--ask", "What is it?"], "`--ask`: expected a file of yours with it"),
        (["--seed", "1"], "`--seed`: expected `--random` with it"),
        (["--random", "--json"], "`--random`: expected no --json with it"),
        (["--web", "--json"], "`--web`: expected no --json with it"),
        (["no/such/folder"], "no/such/folder: expected a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(capsys, options, message):
    assert main(["demo", *options]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mimo: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_page_without_gradio_names_the_extra(monkeypatch, capsys):
    # as if it were not installed
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--web"]) == 2
    assert "pip install 'modeling-mimo[web]'" in capsys.readouterr().err


def test_a_checkpoint_for_text_alone_is_refused(checkpoints, capsys):
    assert main(["demo", str(checkpoints["fp8_fused"])]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "expected a checkpoint that sees and hears" in error
