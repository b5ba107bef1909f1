import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from patience import PATIENCE, settled
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_mimo.cli.demo_web import page_server
from modeling_mimo.cli.demo_web_panels import cache_panel, drafting_panel, layout_panel
from modeling_mimo.cli.demo_web_session import CacheUse, Conversations, Drafting, WebSession
from modeling_mimo.cli.main import main
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint
from modeling_mimo.processors.token_layout_mimo_v2 import Segment, TokenLayout


pytestmark = pytest.mark.usefixtures("one_thread")

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra web")
MEDIA = Path(__file__).parents[1] / "examples" / "media"
TOKENS = 24
# more than any logit of the random weights
BIAS = 1000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(
        tmp_path_factory.mktemp("web") / "checkpoint", "tiny", dtype="bf16", vision=True, audio=True
    )


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture
def session(loaded):
    return WebSession(*loaded, max_new_tokens=TOKENS, options={"do_sample": False})


@pytest.fixture
def conversations(loaded):
    found = Conversations(*loaded, max_new_tokens=TOKENS, options={"do_sample": False})
    yield found
    found.close()


def ask(session, text="What is in it?", files=(), drafting=True):
    return session.answer(text, [str(file) for file in files], drafting, False, lambda delta: None)


class TestSession:
    @pytest.mark.parametrize("written", ["one two three four five", "one two three four five<|im_end|>", ""])
    def test_drafts_are_counted_as_generate_counts_them(self, session, loaded, written):
        # the answer begins as written, so that its drafts are right there and, but by chance, wrong behind it
        model, processor = loaded
        session.thinking = False
        inputs = session.render([{"role": "user", "content": "Count"}])
        tail, ids = inputs["input_ids"][0, -8:].tolist(), processor.tokenizer(written)["input_ids"]
        bias = [[[*tail, *ids[: place + 1]], BIAS] for place in range(len(ids))]
        session.options["sequence_bias"] = bias or None
        wanted = model.generate(
            **inputs, **session.options, max_new_tokens=TOKENS, use_mtp=True, return_dict_in_generate=True
        ).mtp_stats
        ask(session, "Count")
        got = session.drafting
        assert (list(got.proposed), list(got.accepted)) == (wanted.proposed, wanted.accepted)
        assert got.accepted_length == pytest.approx(wanted.mean_accepted_length)
        assert got.tokens == wanted.tokens == session.turns[-1].answer
        assert bool(sum(got.accepted)) == bool(written)

    def test_drafting_changes_the_speed_and_not_the_answer(self, session):
        drafted = ask(session, files=[MEDIA / "chart.png"])
        assert session.drafting.on
        session.reset()
        assert ask(session, files=[MEDIA / "chart.png"], drafting=False) == drafted
        assert session.drafting == Drafting(
            False, tokens=TOKENS, steps=TOKENS - 1, seconds=session.turns[-1].decode_seconds
        )

    def test_bytes_of_the_cache_are_those_of_the_rows_in_use(self, session):
        ask(session, "word " * 100, drafting=False)
        use, config = session.cache_use, session.model.config
        assert use.tokens == session.turns[-1].prompt + TOKENS - 1
        held = {"full_attention": 0, "sliding_attention": 0}
        everything = 0
        for layer_type, layer in zip(config.layer_types, session.cache.layers):
            geometry = config.attention_geometry(layer_type)
            row = 4 * geometry.num_key_value_heads * (geometry.head_dim + geometry.v_head_dim)
            held[layer_type] += row * layer.keys.shape[2]
            everything += row * use.tokens
        assert (use.global_bytes, use.sliding_bytes) == (held["full_attention"], held["sliding_attention"])
        assert use.all_global == everything
        assert use.sliding_bytes < everything - use.global_bytes

    def test_layout_and_numbers_are_there_while_the_answer_is_written(self, session):
        layouts, seen = [], []

        def look(delta):
            layouts.append(session.layout)
            seen.append((session.drafting, session.cache_use))

        session.answer("Which?", [str(MEDIA / "chart.png")], True, False, look)
        assert [segment.tokens for segment in layouts[0].rows[0] if segment.kind == "image"] == [280]
        steps = [drafting.steps for drafting, _ in seen]
        assert steps == sorted(steps)
        assert 0 < seen[len(seen) // 2][0].steps < session.drafting.steps
        assert 0 < seen[len(seen) // 2][1].tokens < session.cache_use.tokens

    @pytest.mark.parametrize("name", ["broken.png", "broken.mp4", "broken  twice.wav", "notes.txt"])
    def test_a_bad_file_is_one_line_and_the_chat_goes_on(self, session, tmp_path, name):
        first = ask(session, "Hello")
        (tmp_path / name).write_text("not what the name says")
        with pytest.raises(ValueError, match=" ".join(name.split())) as raised:
            ask(session, "And this?", [MEDIA / "chart.png", tmp_path / name])
        assert "\n" not in str(raised.value)
        assert str(tmp_path) not in str(raised.value)
        assert session.messages[1] == first
        ask(session, "Go on")
        assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
        assert session.media[-1] == []


class TestConversations:
    def test_users_share_no_conversation_and_get_their_answers_in_turn(self, conversations, session):
        texts = {"ann": "One", "bob": "Two", "cem": "Three"}
        jobs = {
            user: conversations.ask(conversations.of(user), text, [], False, False) for user, text in texts.items()
        }
        while not jobs["cem"].done():
            for earlier, later in pairwise(jobs.values()):
                assert not later.running() or earlier.done()
        for user, text in texts.items():
            jobs[user].result()
            session.reset()
            (said,) = conversations.of(user).said
            assert said.content == ask(session, text, drafting=False)["content"]
            assert said.done

    def test_a_second_question_waits_for_the_first_answer(self, conversations):
        conversation = conversations.of("ann")
        job = conversations.ask(conversation, "One", [], False, False)
        with pytest.raises(ValueError, match="not answered yet"):
            conversations.ask(conversation, "Two", [], False, False)
        job.result()
        assert [said.text for said in conversation.said] == ["One"]

    def test_answers_of_one_token_are_not_compared_by_speed(self, conversations):
        conversation = conversations.of("ann")
        conversations.ask(conversation, "One", [], True, False).result()
        drafted = conversation.session.drafting
        conversation.session.max_new_tokens = 1
        conversations.ask(conversation, "Two", [], False, False).result()
        assert conversation.compared == {True: drafted}

    def test_stop_ends_an_answer_early_and_takes_a_waiting_question_back(self, conversations):
        first, second = conversations.of("ann"), conversations.of("bob")
        for conversation in (first, second):
            conversation.session.max_new_tokens = 400
        jobs = [conversations.ask(conversation, "Go", [], False, False) for conversation in (first, second)]
        second.stop()
        assert jobs[1].cancelled()
        assert second.said == []
        assert settled(lambda: first.said[0].content)
        first.stop()
        jobs[0].result()
        assert first.session.turns[-1].stopped == "interrupted"
        assert 0 < first.session.turns[-1].answer < 400

    def test_a_new_conversation_leaves_no_trace_of_the_old_one(self, conversations):
        old = conversations.of("ann")
        old.session.max_new_tokens = 400
        job = conversations.ask(old, "Go", [], False, False)
        new = conversations.renew("ann")
        assert new is not old
        assert not conversations.is_current("ann", old)
        conversations.ask(new, "Again", [], False, False).result()
        assert job.done()
        assert [said.text for said in new.said] == ["Again"]
        assert new.session.turns[0].reused == 0

    def test_a_question_that_fails_goes(self, conversations, tmp_path):
        conversation = conversations.of("ann")
        conversations.ask(conversation, "One", [], False, False).result()
        (tmp_path / "broken.png").write_text("no picture")
        with pytest.raises(ValueError, match=r"broken\.png"):
            conversations.ask(conversation, "Two", [str(tmp_path / "broken.png")], False, False).result()
        assert [said.text for said in conversation.said] == ["One"]


class TestPanels:
    def test_text_of_the_prompt_is_no_markup(self):
        layout = TokenLayout([[Segment("text", 0, 3, '<script>alert("x")</script><|im_end|>')]])
        html = layout_panel(layout)
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "&lt;|im_end|&gt;" in html

    def test_segments_have_the_share_of_their_tokens(self):
        layout = TokenLayout([[Segment("text", 0, 10, "hi"), Segment("image", 10, 290, index=0, grid=(1, 28, 40))]])
        html = layout_panel(layout)
        assert re.findall(r'<i class="(\w+)" style="flex: (\d+)', html) == [("text", "10"), ("image", "280")]
        assert "290 tokens: 10 text, 280 image" in html

    def test_heads_have_the_share_of_their_taken_drafts(self):
        html = drafting_panel(Drafting(True, 9, 4, (4, 4, 2), (3, 1, 0), 0.5), {}, 3)
        assert re.findall(r"width: ([\d.]+)%", html) == ["75.0", "25.0", "0.0"]
        assert "<b>2.00</b><span>tokens per step" in html
        assert "<b>16</b><span>tokens/s" in html

    def test_the_cache_is_drawn_beside_one_of_global_layers(self):
        html = cache_panel(CacheUse(100, 2048, 1024, 8192, 12288))
        assert re.findall(r"width: ([\d.]+)%", html) == ["16.7", "8.3", "100.0"]
        assert "100 tokens, 4.0 times less" in html


@pytest.fixture
def served(loaded, tmp_path, monkeypatch):
    """The address of the page in a thread, and its app."""
    from modeling_mimo.cli.demo_web_app import build_app, shipped_examples

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    app = build_app(*loaded, shipped_examples(loaded[0]), "Tiny", TOKENS)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = page_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert settled(lambda: server.started)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", app
        finally:
            server.should_exit = True
            thread.join()
            app.conversations.close()


def client_of(address):
    """A program that uses the page."""
    from gradio_client import Client

    return Client(address, verbose=False)


def answers(client, text, *files):
    """What the page shows while it answers: chat, box, notice, layout, drafting and cache, again and again."""
    from gradio_client import handle_file

    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    return list(client.submit(message, True, False, api_name="/ask"))


@needs_gradio
class TestServer:
    def test_examples_are_what_the_model_can_be_asked(self, loaded):
        from modeling_mimo.cli.demo_questions import shipped
        from modeling_mimo.cli.demo_web_app import shipped_examples

        examples = shipped_examples(loaded[0])
        assert len(examples) == len([question for question in shipped()[0] if question.tools is None])
        assert {Path(path).suffix for example in examples for path in example.files} == {".png", ".mp4", ".wav"}
        assert {example.thinking for example in examples} == {True, False}
        assert all(example.text and all(map(os.path.isfile, example.files)) for example in examples)
        text_model = argparse.Namespace(visual=None)
        assert shipped_examples(text_model) == [example for example in examples if not example.files]

    def test_a_client_asks_about_a_file(self, served):
        *first, last = answers(client_of(served[0]), "What is in it?", MEDIA / "chart.png")
        chat, _, notice, layout, drafting, cache = last
        assert [turn["role"] for turn in chat] == ["user", "assistant"]
        assert "images[0]" in layout
        assert "280 image" in layout
        assert "tokens per step" in drafting
        assert re.search(r"[\d.]+ KiB", cache)
        assert f"Cut off at {TOKENS} tokens." in notice
        # it came in pieces
        assert len(first) > 1

    def test_two_clients_share_no_conversation(self, served):
        ann, bob = client_of(served[0]), client_of(served[0])
        for user, turns in ((ann, 2), (bob, 2), (ann, 4)):
            assert len(answers(user, "Go on")[-1][0]) == turns
        assert ann.predict(api_name="/new_chat")[0] == []
        assert len(ann.predict(False, api_name="/example_1")[0]) == 2

    def test_a_broken_file_is_one_line(self, served, tmp_path):
        (tmp_path / "broken.png").write_text("no picture")
        client = client_of(served[0])
        chat, box, notice, *_ = answers(client, "And this?", tmp_path / "broken.png")[-1]
        assert chat == []
        assert 'class="error"' in notice
        assert ">broken.png: " in notice
        assert "uploads" not in notice
        # nothing has to be typed again
        assert box["value"]["text"] == "And this?"
        assert "Nothing was asked" in answers(client, " ")[-1][2]

    def test_files_of_the_machine_are_not_handed_out(self, served):
        for path in (Path(__file__), MEDIA.parent / "finetune", Path("/etc/passwd")):
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(f"{served[0]}/gradio_api/file={path}")
            assert raised.value.code in (403, 404)

    def test_the_page_may_load_nothing_from_elsewhere(self, served):
        with urllib.request.urlopen(served[0]) as response:
            assert response.headers["Content-Security-Policy"].startswith("default-src 'self'")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(served[0], headers={"Host": "elsewhere.example"}))

    @pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_and_what_was_uploaded_goes(self, folder, tmp_path, ending):
        command = [sys.executable, "-m", "modeling_mimo.cli.main", "demo", str(folder), "--web", "--port", "0"]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            line = process.stdout.readline()
            assert re.fullmatch(r"checkpoint is at http://127\.0\.0\.1:\d+; Ctrl-C stops\.\n", line)
            address = line.split()[3].rstrip(";")
            # what a tab listens to as long as it is open
            with urllib.request.urlopen(f"{address}/gradio_api/heartbeat/tab") as response:
                assert response.status == 200
                assert list(tmp_path.glob("mimo-demo-*"))
                process.send_signal(ending)
                out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert (process.returncode, out) == (0, "")
        assert not re.search("traceback|error", err, re.IGNORECASE)
        assert not list(tmp_path.glob("mimo-demo-*"))

    def test_a_port_in_use_is_one_line(self, folder, capsys):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            assert main(["demo", str(folder), "--web", "--port", str(sock.getsockname()[1])]) == 2
        assert re.fullmatch(r"mimo: error: 127\.0\.0\.1:\d+: expected a free address .*\n", capsys.readouterr().err)


@pytest.fixture(scope="module")
def open_browser():
    """Opens a tab of a headless Chromium at an address."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # root has no sandbox, and containers have little shared memory
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,800"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    # the window's frame takes some of its height
    metrics = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield lambda address: Tab(browser, address)
    browser.quit()


class Tab:
    """The page in a browser."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(address)
        self.find("#box textarea")

    def find(self, selector):
        found = []
        assert settled(lambda: found.extend(self.browser.find_elements("css selector", selector)) or found)
        return found[0]

    def text(self, selector):
        # read at once: an element may be replaced between finding and reading it
        return self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def reads(self, selector, pattern):
        assert settled(lambda: re.search(pattern, self.text(selector))), self.text(selector)
        return re.search(pattern, self.text(selector))

    def attach(self, path):
        self.find("#box input[type=file]").send_keys(str(path))
        self.find("#box .thumbnail-item")

    def send(self, text):
        self.find("#box textarea").send_keys(f"{text}\n")

    def answered(self):
        """Waits for the end of an answer, whose box sends again."""
        self.find("#box .submit-button:not([disabled])")

    def hosts(self):
        """Whom the page has sent requests to."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}


@needs_gradio
class TestBrowser:
    def test_a_picture_is_dropped_asked_about_and_its_panels_filled(self, served, open_browser):
        tab = open_browser(served[0])
        tab.attach(MEDIA / "chart.png")
        tab.send("What is in it?")
        tab.reads("#chat .bot", r"\w{3}")
        tab.reads("#notice", f"Cut off at {TOKENS} tokens")
        tab.reads("#layout", r"280 image(.|\n)*images\[0\]")
        tab.reads("#drafting", r"\d\.\d\d\s+tokens per step(.|\n)*head 3(.|\n)*\d+ of \d+ taken")
        tab.reads("#cache", r"held\s+[\d.]+ KiB\s+all global\s+[\d.]+ MiB")
        tab.answered()

        tab.find("#draft input").click()
        tab.send("And now?")
        tab.reads("#drafting", r"last answer not drafted(.|\n)*drafts on(.|\n)*drafts off\s+\d+ tokens/s")
        tab.answered()
        assert tab.hosts() == {served[0].split("/")[2]}
        severe = [entry["message"] for entry in tab.browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert not severe

    def test_an_example_is_asked_with_one_click_and_a_new_chat_is_empty(self, served, open_browser):
        tab = open_browser(served[0])
        tab.find("#examples button:nth-of-type(2)").click()
        tab.reads("#layout", r"videos\[0\] pair 0")
        tab.reads("#notice", "Cut off")
        tab.reads("#chat", r"What happens\?")
        tab.answered()
        tab.find("#new").click()
        tab.reads("#cache", "empty")
        assert "What happens?" not in tab.text("#chat")

    def test_the_stop_button_ends_an_answer_and_leaving_ends_the_conversation(self, served, open_browser):
        address, app = served
        app.conversations.options["max_new_tokens"] = 2000
        tab = open_browser(address)
        tab.send("Go on and on")
        tab.reads("#chat .bot", r"\w{3}")
        tab.find("#box .stop-button").click()
        tab.reads("#notice", "Stopped")
        tab.answered()
        tab.send("Go on")
        (conversation,) = app.conversations.users.values()
        assert settled(lambda: conversation.busy)
        tab.browser.get("about:blank")
        assert settled(lambda: not app.conversations.users and not conversation.busy)

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_all_of_it_fits_the_window(self, served, open_browser, theme):
        tab = open_browser(f"{served[0]}?__theme={theme}")
        tab.find("#examples button").click()
        tab.reads("#notice", "Cut off")
        places = tab.browser.execute_script(
            "return [...arguments].map(id => document.getElementById(id).getBoundingClientRect())"
            ".map(r => [r.left, r.top, r.right, r.bottom])",
            *("top", "chat", "examples", "notice", "box", "layout", "drafting", "draft", "cache"),
        )
        for left, top, right, bottom in places:
            assert 0 <= left < right <= 1280
            assert 0 <= top < bottom <= 800
        for stack in (places[:5], [places[0], *places[5:]]):
            for (*_, above), (_, below, *_) in pairwise(stack):
                assert above <= below
        assert tab.browser.execute_script("return document.documentElement.scrollHeight") <= 800
