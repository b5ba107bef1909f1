from pathlib import Path

import pytest

from modeling_mimo.cli.main import main


pytestmark = pytest.mark.usefixtures("one_thread")

MEDIA = Path(__file__).parents[1] / "examples" / "media"


def test_it_reads_sees_and_hears(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A short text to go on with.", encoding="utf-8")
    options = ["--size", "tiny", "--max-new-tokens", "4", "--text", str(text)]
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


def test_without_options_it_needs_no_file_of_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--size", "tiny", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("KV cache for ") == 1
    assert "images[0]" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "`--max-new-tokens`: expected at least 1, got 0"),
        (["--image", "missing.png"], "`--image`: expected a file or URL, got missing.png"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(capsys, options, message):
    assert main(["demo", "--size", "tiny", *options]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mimo: error: ")
    assert message in error
    assert error.count("\n") == 1
