import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_mimo.cli.chat import DIM, Printer
from modeling_mimo.cli.chat_session import MAX_SNAPSHOTS, ChatSession, TextDecoder
from modeling_mimo.cli.main import main
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.processors.response_parsing_mimo_v2 import parse_response


pytestmark = pytest.mark.usefixtures("one_thread")

MEDIA = Path(__file__).parents[1] / "examples" / "media"
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """ "text" and "omni": small checkpoints with a tokenizer."""
    root = tmp_path_factory.mktemp("chat")
    return {
        name: write_random_checkpoint(root / name, "tiny", dtype="bf16", vision=name == "omni", audio=name == "omni")
        for name in ("text", "omni")
    }


@pytest.fixture(scope="module")
def loaded(folders):
    """name -> (model, processor); float32, so that a cached prefix and a full pass round alike."""
    found = {}

    def load(name):
        if name not in found:
            model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
            found[name] = (model, AutoProcessor.from_pretrained(folders[name]))
        return found[name]

    return load


@pytest.fixture
def chat(loaded):
    """Makes a session of a named checkpoint; answers are TOKENS long."""
    return lambda name="text", **settings: ChatSession(*loaded(name), **{"max_new_tokens": TOKENS, **settings})


def plain_answer(session):
    """The answer of one greedy `generate`, without a used cache, to all messages but the last."""
    inputs = session.render(session.messages[:-1])
    output = session.model.generate(**inputs, max_new_tokens=session.max_new_tokens)
    prompt = session.tokenizer.decode(inputs["input_ids"][0])
    return parse_response(session.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), prefix=prompt)


def image_file(folder, colour, size=(128, 96)):
    path = folder / f"{colour}.png"
    Image.new("RGB", size, colour).save(path)
    return str(path)


# 60 tokens are too many for `crop`: what the conversation renders otherwise than generated goes back to a snapshot
@pytest.mark.parametrize("tokens", [TOKENS, 60])
def test_every_turn_equals_the_answer_without_a_cache(chat, tokens):
    session = chat(max_new_tokens=tokens)
    for text in ("Hello there", "What is a kilometre?", "你好, 世界"):
        assert session.ask(text) == plain_answer(session)
    for before, turn in zip(session.turns, session.turns[1:]):
        # at least the earlier prompt was not computed again, whatever became of the answer's tokens
        assert before.prompt <= turn.reused < turn.prompt
    assert session.turns[0].reused == 0


def test_settings_may_change_between_turns(chat):
    session = chat(thinking=False)
    session.ask("One")
    session.thinking, session.system = True, "Be brief."
    assert session.ask("Two") == plain_answer(session)
    assert session.turns[-1].reused < 10
    session.thinking = False
    assert session.ask("Three") == plain_answer(session)
    assert session.turns[-1].reused >= session.turns[-2].prompt


@pytest.mark.parametrize("tokens", [TOKENS, 60])
def test_undo_takes_back_a_turn_from_the_cache_too(chat, tokens):
    session = chat(max_new_tokens=tokens)
    session.ask("First")
    session.ask("Second")
    session.undo()
    assert len(session.messages) == 2
    assert session.ask("Another second") == plain_answer(session)
    assert session.turns[-1].reused >= session.turns[0].prompt
    session.undo()
    session.undo()
    assert session.messages == []
    with pytest.raises(ValueError, match="/undo: expected a message to take back"):
        session.undo()
    assert session.ask("First") == plain_answer(session)


def test_the_same_message_again_needs_one_token_only(chat):
    session = chat()
    first = session.ask("Repeat after me")
    session.undo()
    assert session.ask("Repeat after me") == first
    assert session.turns[-1].reused == session.turns[-1].prompt - 1


def test_reset_forgets_everything(chat):
    session = chat()
    first = session.ask("Hello")
    session.reset()
    assert session.stats()["cached_tokens"] == 0
    assert session.ask("Hello") == first
    assert (session.turns[-1].reused, len(session.messages)) == (0, 2)


def test_a_stopped_answer_stays_in_the_conversation(chat):
    session = chat(max_new_tokens=60)
    parts = []

    def stop_after_some(delta):
        parts.append(delta)
        if len(parts) == 3:
            assert session.stop()
            assert not session.stop()

    message = session.ask("Tell me more", stop_after_some)
    assert session.turns[-1].stopped == "interrupted"
    assert session.turns[-1].answer < 60
    assert message == session.messages[-1]
    assert len(session.cached) == session.cache.get_seq_length()
    assert session.ask("Go on") == plain_answer(session)


def test_an_error_leaves_the_conversation_as_it_was(chat):
    session = chat()
    session.ask("Hello")

    def fail(delta):
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        session.ask("More", fail)
    assert len(session.messages) == 2
    with pytest.raises(ValueError, match="context: expected at most 4095 tokens of prompt, got"):
        session.ask("word " * 5000)
    assert session.ask("More") == plain_answer(session)


def test_rolling_back_says_what_the_cache_holds(chat):
    session = chat(max_new_tokens=60)
    session.ask("Hello")
    prompt = session.turns[0].prompt
    # within reach of `crop`, before the last snapshot's end, before any snapshot
    for kept, expected in ((len(session.cached) - 5, len(session.cached) - 5), (prompt + 3, prompt), (8, 0)):
        assert session.roll_back_to([*session.cached[:kept], -1, -1]) == expected
        assert len(session.cached) == session.cache.get_seq_length() == expected


def test_snapshots_are_bounded(chat):
    session = chat(max_new_tokens=2)
    for turn in range(MAX_SNAPSHOTS + 2):
        session.ask(f"Turn {turn}")
    assert len(session.snapshots) == MAX_SNAPSHOTS


def test_parts_of_the_stream_add_up_to_the_message(chat):
    session = chat(max_new_tokens=80, thinking=False)
    joined = {}
    for text in ("Hello", "Grüße", "再见"):
        joined.clear()

        def add(delta, joined=joined):
            for key, value in delta.items():
                joined[key] = joined.get(key, "") + value

        message = session.ask(text, add)
        assert joined == {key: value for key, value in message.items() if key == "content" and value}


@pytest.mark.parametrize("text", ["Grüße 你好 🦊🏳️‍🌈 end", "plain", "🦊"])
def test_characters_of_several_bytes_are_never_cut(loaded, text):
    tokenizer = loaded("text")[1]
    ids = tokenizer.encode(text)
    decoder = TextDecoder(tokenizer)
    parts = [decoder.feed(token) for token in ids]
    assert "�" not in "".join(parts)
    assert "".join(parts) + decoder.close() == text
    # more tokens than characters came out piecewise
    assert len(ids) >= len([part for part in parts if part])


def test_bytes_that_are_no_character_come_out_too(loaded):
    tokenizer = loaded("text")[1]
    ids = [*tokenizer.encode("🦊")[:-1], *tokenizer.encode(" and on"), *tokenizer.encode("🦊")[:-1]]
    decoder = TextDecoder(tokenizer)
    assert "".join([*map(decoder.feed, ids), decoder.close()]) == tokenizer.decode(ids)


def test_an_image_then_a_video(chat, tmp_path):
    session = chat("omni")
    attached = session.attach("image", image_file(tmp_path, "red"))
    assert (attached.grid, attached.tokens) == ([1, 6, 8], {"image": 12, "video": 0, "audio": 0})
    assert session.ask("What is this?") == plain_answer(session)
    session.attach("video", str(MEDIA / "clip.mp4"))
    assert session.ask("And what moves here?") == plain_answer(session)
    assert session.turns[1].reused >= session.turns[0].prompt
    assert session.ask("Compare the two") == plain_answer(session)
    assert session.turns[2].reused >= session.turns[1].prompt
    table = session.explain()
    assert "images[0]" in table
    assert "videos[0] pair 2" in table


def test_a_sound_then_a_video_with_sound(chat):
    session = chat("omni")
    attached = session.attach("audio", str(MEDIA / "speech.wav"))
    assert attached.grid is None
    assert f"speech.wav: {attached.tokens['audio']} tokens of sound" in str(attached)
    assert session.ask("What was said?") == plain_answer(session)
    attached = session.attach("video", str(MEDIA / "clip_with_sound.mp4"))
    assert attached.tokens["video"] > 0
    assert attached.tokens["audio"] > 0
    assert session.ask("And here?") == plain_answer(session)
    assert session.turns[1].reused >= session.turns[0].prompt
    # the placeholders of a video with sound are told apart from those of another sound
    assert {session.media[0][0].key, attached.key} <= set(session.cached)
    table = session.explain()
    assert "audio[0]" in table
    assert "audio[1]" in table
    assert "videos[0] pair 1" in table


def test_another_image_of_the_same_size_is_not_taken_from_the_cache(chat, tmp_path):
    session = chat("omni")
    for colour in ("red", "blue"):
        session.attach("image", image_file(tmp_path, colour))
        assert session.ask("Which colour?") == plain_answer(session)
        cached = [key for key in session.cached if isinstance(key, str)]
        assert set(cached) == {session.media[-1][0].key}
        session.undo()


def test_media_stay_attached_after_an_error_and_leave_with_reset(chat, tmp_path):
    session = chat("omni")
    session.attach("image", image_file(tmp_path, "red"))
    with pytest.raises(ValueError, match="context:"):
        session.ask("word " * 5000)
    assert len(session.attached) == 1
    session.reset()
    assert session.attached == []
    assert session.ask("Nothing to see") == plain_answer(session)


def test_media_that_cannot_be_used(chat, folders, tmp_path):
    with pytest.raises(ValueError, match=r"chart.png: expected text only, this checkpoint neither sees nor hears"):
        chat().attach("image", str(MEDIA / "chart.png"))
    blind = AutoModelForCausalLM.from_pretrained(folders["omni"], load_towers=False)
    session = ChatSession(blind, AutoProcessor.from_pretrained(folders["omni"]))
    with pytest.raises(ValueError, match="was loaded without its towers"):
        session.attach("image", str(MEDIA / "chart.png"))
    session = chat("omni")
    for kind in ("image", "video", "audio"):
        with pytest.raises(ValueError, match=r"make_media\.py: "):
            session.attach(kind, str(MEDIA / "make_media.py"))
        with pytest.raises(OSError, match=f"{kind}: expected a file"):
            session.attach(kind, str(tmp_path / "missing"))
    assert session.attached == []


def run_lines(folder, monkeypatch, capsys, lines, *options):
    """Status, output and errors of a chat in which `lines` are typed."""
    source = io.StringIO("\n".join(lines) + "\n")
    source.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", source)
    status = main(["chat", str(folder), "--max-new-tokens", "4", *options])
    return status, *capsys.readouterr()


def test_commands(folders, monkeypatch, capsys):
    lines = ["/explain", "/stats", "Hello", "", "/explain", "/stats", "/think off", "/system Be brief.", '"""/a']
    lines += ['b"""', "/undo", "/undo", "/undo", "/reset", "/think", "/help", "/hlep", "/image x", "/exit", "never"]
    status, out, error = run_lines(folders["text"], monkeypatch, capsys, lines)
    assert status == 0
    assert "text only. /help lists the commands" in out
    assert "tokens, all text: '<|im_start|>system" in out
    assert "KV cache: 0 tokens" in out
    assert "of them from the cache" in out
    assert out.count("[max_new_tokens]") == 2
    assert "/image FILE|URL" in out
    assert [line.removeprefix("mimo: error: ") for line in error.splitlines()] == [
        "/explain: expected a message before it, got none.",
        "/undo: expected a message to take back, got an empty conversation.",
        "/think: expected a value after it.",
        "/hlep: expected a command that /help lists.",
        "x: expected text only, this checkpoint neither sees nor hears.",
    ]


def test_one_shot(folders, monkeypatch, capsys):
    folder = str(folders["text"])
    assert main(["chat", folder, "--prompt", "Hello", "--max-new-tokens", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["role"], answer["stats"]["answer"]) == ("assistant", 4)
    assert main(["chat", folder, "--prompt", "Hello", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == answer["content"] + "\n" * (not answer["content"].endswith("\n"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert main(["chat", folder, "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["content"] == answer["content"]


def test_sampling_follows_the_seed(folders, capsys):
    found = []
    for seed in ("1", "1", "2"):
        options = ["--temperature", "2", "--top-p", "0.99", "--seed", seed, "--max-new-tokens", "8"]
        assert main(["chat", str(folders["text"]), "--prompt", "Hello", *options]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["/nowhere", "--prompt", "x"], "/nowhere: expected a folder or the name of a repository"),
        (["{text}", "--prompt", "x", "--image", "missing.png"], "`--image`: expected a file or URL, got missing.png"),
        (["{text}", "--prompt", "x", "--image", "{media}/chart.png"], "this checkpoint neither sees nor hears"),
        (["{omni}", "--prompt", "x", "--image", "{media}/make_media.py"], "expected an image file"),
        (["{text}", "--prompt", "x", "--max-new-tokens", "0"], "`--max-new-tokens`: expected at least 1, got 0"),
        (["{text}", "--prompt", "x", "--temperature", "-1"], "`--temperature`: expected 0 or more, got -1.0"),
        (["{text}", "--prompt", "x", "--top-p", "2"], "`--top-p`: expected more than 0 and at most 1, got 2.0"),
        (["{text}", "--prompt", " "], "`--prompt`: expected a text, got none"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(folders, capsys, options, message):
    places = {**folders, "media": MEDIA}
    assert main(["chat", *(option.format(**places) for option in options)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("mimo: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_reasoning_is_dimmed_on_a_terminal_and_tagged_elsewhere(monkeypatch, capsys):
    def shown(is_terminal, no_colour):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
        monkeypatch.setenv("NO_COLOR", no_colour)
        printer = Printer()
        for delta in ({"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "yes\x1b[31m"}):
            printer.show(delta)
        printer.close()
        return capsys.readouterr().out

    assert shown(True, "") == f"{DIM}hmm\x1b[0m\nyes�[31m\n"
    assert shown(True, "1") == "<think>hmm</think>\nyes�[31m\n"
    # what goes to a file or a pipe is what the model wrote
    assert shown(False, "") == "<think>hmm</think>\nyes\x1b[31m\n"


def test_a_real_terminal_with_ctrl_c_and_ctrl_d(folders):
    """Ctrl-C in an answer of 4,000 tokens stops it, the chat goes on, Ctrl-D leaves."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "modeling_mimo.cli.main", "chat", str(folders["text"])]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "3900"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )
    os.close(terminal)
    screen = ""

    def wait_for(text):
        """Reads up to `text` and forgets what was on the screen before its end."""
        nonlocal screen
        while text not in screen:
            assert select.select([controller], [], [], PATIENCE)[0], screen
            # OSError when the process has ended
            screen += os.read(controller, 65536).decode("utf-8", "replace")
        screen = screen.partition(text)[2]

    try:
        wait_for(">>> ")
        os.write(controller, b"Hello\n")
        wait_for("Hello\r\n")
        # the answer has begun
        wait_for(" ")
        process.send_signal(signal.SIGINT)
        wait_for("[interrupted]")
        wait_for(">>> ")
        os.write(controller, b"/stats\n")
        wait_for("KV cache: ")
        wait_for(">>> ")
        os.write(controller, b"\x04")
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        os.close(controller)
