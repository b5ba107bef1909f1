"""The page of `mimo demo --web`: chat on the left, on the right what the model is doing."""

import json
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from modeling_mimo.processors.token_layout_mimo_v2 import TokenLayout

from . import demo_web_panels as panels
from .demo import stored_as
from .demo_questions import shipped
from .demo_web_session import CacheUse, Conversation, Conversations, Said, in_one_line


# seconds between two looks at the answer that is written
INTERVAL = 0.1
# seconds: how often uploads are looked through, and how old they get
DELETE_CACHE = (600, 24 * 3600)
FILE_TYPES = ["image", "video", "audio"]
PLACEHOLDER = "Ask in words, or drop a picture, a clip or a sound here."
EMPTY_CHAT = "Ask below, in words or about a picture, a clip or a sound, or begin with an example."


@dataclass
class Example:
    """A button that asks `text` about `files` in a new chat."""

    label: str
    text: str
    files: list[str] = field(default_factory=list)
    thinking: bool = False


def shipped_examples(model) -> list[Example]:
    """Those of `mimo demo` that a page without tools can ask, about what the model can see and hear."""
    examples = []
    for question in shipped()[0]:
        content = question.messages[0]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        files = [part["path"] for part in parts if part["type"] != "text"]
        if question.tools or (files and model.visual is None):
            continue
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        examples.append(Example(question.label, text, files, question.options["enable_thinking"]))
    return examples


class Page:
    """What the page shows, and what happens on it. Handlers get the user from gradio's request."""

    def __init__(self, conversations: Conversations, examples: list[Example]):
        self.conversations, self.examples = conversations, examples
        mtp = conversations.model.model.mtp
        self.heads = 0 if mtp is None else len(mtp.layers)

    def ask(self, message: dict, drafting: bool, thinking: bool, request: gr.Request) -> Iterator[tuple]:
        """Values of `outputs` while the answer to {"text", "files"} is written, and after it."""
        text, files = (message.get("text") or "").strip(), list(message.get("files") or [])
        yield from self.answer(request.session_hash, text, files, drafting, thinking)

    def ask_example(self, index: int, drafting: bool, request: gr.Request) -> Iterator[tuple]:
        example = self.examples[index]
        self.conversations.renew(request.session_hash)
        yield from self.answer(request.session_hash, example.text, example.files, drafting, example.thinking)

    def answer(self, user: str, text: str, files: list[str], drafting: bool, thinking: bool) -> Iterator[tuple]:
        conversation = self.conversations.of(user)
        try:
            if not text and not files:
                raise ValueError("Nothing was asked.")
            job = self.conversations.ask(conversation, text, files, drafting, thinking)
        except ValueError as error:
            yield gr.skip(), gr.skip(), panels.notice(str(error)), *(gr.skip(),) * 3
            return
        shown, box = (), box_while(True)
        while not job.done():
            values = self.values(conversation, "" if job.running() else "Waiting: another answer is being written.")
            looked = time.perf_counter()
            yield changed(values, shown, box)
            shown, box = values, gr.skip()
            # gradio reads the files of the whole chat each time; large ones must not keep it from all else
            wait([job], timeout=max(INTERVAL, time.perf_counter() - looked))
            # a new conversation has begun on this page, or nobody looks at it any more
            if not self.conversations.is_current(user, conversation):
                return
        try:
            job.result()
        except CancelledError:
            line, is_error, left = "Stopped before it began.", False, text
        except (ValueError, OSError, NotImplementedError) as error:
            line, is_error, left = in_one_line(error), True, text
        except Exception as error:
            traceback.print_exc()
            line, is_error, left = f"{type(error).__name__}: {in_one_line(error)}", True, text
        else:
            line, is_error, left = ending(conversation), False, ""
        yield changed(self.values(conversation, line, is_error), (), box_while(False, left))

    def stop(self, request: gr.Request) -> None:
        self.conversations.of(request.session_hash).stop()

    def renew(self, request: gr.Request) -> tuple:
        return changed(self.values(self.conversations.renew(request.session_hash)), (), box_while(False))

    def leave(self, request: gr.Request) -> None:
        self.conversations.drop(request.session_hash)

    def values(self, conversation: Conversation, line: str = "", is_error: bool = False) -> tuple:
        """Of the chat, the notice, the layout, and the panels of drafting and cache."""
        session = conversation.session
        return (
            [message for said in conversation.said for message in messages(said)],
            panels.notice(line, is_error),
            session.layout,
            panels.drafting_panel(session.drafting, conversation.compared, self.heads),
            panels.cache_panel(session.cache_use),
        )


def changed(values: tuple, shown: tuple, box) -> tuple:
    """`values` for gradio, with the box behind the chat, and nothing in place of what is `shown` already."""
    chat, notice, layout, drafting, cache = (
        gr.skip() if shown and new == old else new for new, old in zip(values, shown or values)
    )
    # a panel of thousands of lines is written once
    if layout is None or isinstance(layout, TokenLayout):
        layout = panels.layout_panel(layout)
    return chat, box, notice, layout, drafting, cache


def box_while(busy: bool, text: str = "") -> gr.MultimodalTextbox:
    """The box to ask in, with a button that stops the answer in place of the one that sends."""
    value = {"text": text, "files": []}
    return gr.MultimodalTextbox(value=value, interactive=not busy, submit_btn=not busy, stop_btn=busy)


def messages(said: Said) -> list[dict[str, Any]]:
    """Of a question and its answer, as gradio's chatbot shows them."""
    content: list[Any] = [{"path": path} for path in said.files]
    if said.text:
        content.append(text_part(said.text))
    shown = [{"role": "user", "content": content}]
    if said.reasoning:
        thinking = said.thought_seconds is None and not said.done
        metadata = {"title": "Thinking", "status": "pending" if thinking else "done"}
        if said.thought_seconds is not None:
            metadata["duration"] = said.thought_seconds
        shown.append({"role": "assistant", "content": [text_part(said.reasoning)], "metadata": metadata})
    calls = [f"```json\n{json.dumps(call, indent=2, ensure_ascii=False)}\n```" for call in said.tool_calls]
    answer = "\n".join([said.content, *calls]).strip()
    if answer or (said.done and not said.reasoning):
        shown.append({"role": "assistant", "content": [text_part(answer or "(an empty answer)")]})
    elif not said.done and not said.reasoning:
        shown.append({"role": "assistant", "content": "…"})
    return shown


def text_part(text: str) -> dict[str, str]:
    """Unlike a plain string, it keeps its spaces at the beginning of lines."""
    return {"type": "text", "text": text}


def ending(conversation: Conversation) -> str:
    """What is to be said of the last answer, where it did not end by itself."""
    stopped = conversation.session.turns[-1].stopped
    if stopped == "max_new_tokens":
        return f"Cut off at {conversation.session.turns[-1].answer:,} tokens."
    return "Stopped." if stopped == "interrupted" else ""


def build_app(
    model, processor, examples: list[Example] = (), name: str = "MiMo", max_new_tokens: int | None = None
) -> gr.Blocks:
    """The page for a loaded checkpoint; `app.conversations` has to be closed after it.

    Answers are greedy, so that drafting changes their speed and nothing else.
    """
    options = {"max_new_tokens": max_new_tokens, "options": {"do_sample": False}}
    page = Page(Conversations(model, processor, **options), list(examples))
    with gr.Blocks(title=name, analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE) as app:
        with gr.Row(elem_id="top"):
            gr.HTML(heading(model, name))
            new = gr.Button("New chat", size="sm", elem_id="new", scale=0)
        with gr.Row(elem_id="work"):
            with gr.Column(scale=3, min_width=420, elem_id="talk"):
                chat = gr.Chatbot(show_label=False, elem_id="chat", buttons=[], placeholder=EMPTY_CHAT)
                with gr.Row(elem_id="examples"):
                    buttons = [gr.Button(example.label, size="sm") for example in page.examples]
                    thinking = gr.Checkbox(False, label="Think first", elem_id="think", min_width=0)
                notice = gr.HTML(elem_id="notice")
                box = gr.MultimodalTextbox(
                    show_label=False,
                    elem_id="box",
                    placeholder=PLACEHOLDER,
                    file_types=FILE_TYPES,
                    file_count="multiple",
                    autofocus=True,
                )
            with gr.Column(scale=2, min_width=360, elem_id="side"):
                with gr.Column(elem_classes="card grows"):
                    layout = gr.HTML(panels.layout_panel(None), elem_id="layout")
                with gr.Column(elem_classes="card"):
                    drafting_panel = gr.HTML(panels.drafting_panel(None, {}, page.heads), elem_id="drafting")
                    drafting = gr.Checkbox(
                        page.heads > 0, label="Draft the next answers", interactive=page.heads > 0, elem_id="draft"
                    )
                with gr.Column(elem_classes="card"):
                    cache = gr.HTML(panels.cache_panel(CacheUse()), elem_id="cache")
        outputs = [chat, box, notice, layout, drafting_panel, cache]
        quiet = {"outputs": outputs, "show_progress": "hidden", "concurrency_limit": None}
        box.submit(page.ask, [box, drafting, thinking], api_name="ask", **quiet)
        for index, button in enumerate(buttons):
            button.click(page.ask_example, [gr.State(index), drafting], api_name=f"example_{index}", **quiet)
        box.stop(page.stop, queue=False, show_progress="hidden", api_name="stop")
        for event in (new.click, chat.clear):
            event(page.renew, outputs=outputs, queue=False, show_progress="hidden", api_name="new_chat")
        app.unload(page.leave)
    app.conversations = page.conversations
    app.example_files = [path for example in page.examples for path in example.files]
    return app


def heading(model, name: str) -> str:
    """What is loaded, in one line."""
    senses = "text" if model.visual is None else "text, pictures, clips"
    senses += "" if model.audio_encoder is None else ", sound"
    layers = model.config.layer_types
    count = layers.count("full_attention")
    facts = [
        f"{model.num_parameters() / 1e6:,.1f}M parameters stored as {stored_as(model.load_report)}",
        f"{count} global and {len(layers) - count} sliding layers",
        senses,
        f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
    ]
    return f'<div id="head"><b>{escape(name)}</b><span>{escape(" · ".join(facts))}</span></div>'
