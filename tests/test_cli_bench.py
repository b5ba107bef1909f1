"""`mimo bench` on a small random checkpoint."""

import json

import pytest

from modeling_mimo.cli.main import main
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    "--prompt-tokens",
    "20",
    "--new-tokens",
    "12",
    "--repeats",
    "1",
    "--dtype",
    "float32",
    "--device-map",
    "cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_random_checkpoint(tmp_path_factory.mktemp("bench") / "model", dtype="bf16"))


def test_it_measures_every_depth_and_finds_the_same_tokens(folder, capsys):
    assert main(["bench", folder, "--mtp", "--batch", "2", "--json", *OPTIONS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["drafts"] for row in result["rows"]] == ["plain", 1, 2, 3, "auto"]
    assert result["same_tokens"]
    plain, *drafted = result["rows"]
    assert plain["times_plain"] == 1
    for row in drafted:
        assert len(row["proposed"]) == len(row["accepted"]) == 3
        assert 1 <= row["mean_accepted_length"] <= 4
        assert sum(row["steps_by_drafts"]) + 1 == row["forwards"]
        assert row["seconds"].keys() == {"draft", "verify", "other"}
    assert drafted[1]["proposed"][2] == 0
    # per token K 24 + V 16 numbers of 4 bytes, in 2 layers with 2 KV heads and in 6 with 4
    assert result["cache_bytes_all_global"] == 2 * 20 * 4 * (24 + 16) * (2 * 2 + 6 * 4)
    assert result["cache_bytes"] > 0


def test_people_get_a_table(folder, capsys):
    assert main(["bench", folder, "--mtp", "--temperature", "0.7", *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(folder)
    assert [line.split()[0] for line in lines[-5:]] == ["plain", "1", "2", "3", "auto"]
    assert main(["bench", folder, *OPTIONS]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "plain"


def test_wrong_input_is_named_in_one_line(folder, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    bad = {
        "`--new-tokens`: expected at least 1, got 0": [folder, "--new-tokens", "0"],
        "`--temperature`: expected at least 0, got -1.0": [folder, "--temperature", "-1"],
        "expected a file with text in it": [folder, "--text", str(empty)],
        "nowhere": [str(tmp_path / "nowhere")],
    }
    for message, arguments in bad.items():
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    headless = write_random_checkpoint(tmp_path / "headless", dtype="bf16", overrides={"num_nextn_predict_layers": 0})
    assert main(["bench", str(headless), "--mtp"]) == 2
    assert "`--mtp`: expected a checkpoint with MTP heads" in capsys.readouterr().err
