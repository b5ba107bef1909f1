"""Conversations of `mimo demo --web`: who talks, and what is measured while the model answers; knows no page."""

import mimetypes
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from modeling_mimo.processors.token_layout_mimo_v2 import TokenLayout

from .chat_session import ChatSession
from .demo import full_attention_bytes


# what `mimetypes` does not know on every machine
KINDS = {".flac": "audio", ".m4a": "audio", ".opus": "audio", ".webp": "image", ".mkv": "video", ".m4v": "video"}


@dataclass(frozen=True)
class Drafting:
    """How an answer is drafted, up to now.

    on: whether it is. tokens: generated, the one of the prefill included. steps: forwards of the trunk behind the
    prefill. proposed, accepted: drafts per head. seconds: behind the prefill.
    """

    on: bool
    tokens: int = 0
    steps: int = 0
    proposed: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens per step: of the accepted drafts, and the trunk's own."""
        return 1 + sum(self.accepted) / max(1, self.steps)

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


class DraftMeter:
    """Counts drafts and how many of them the trunk takes, from what its forwards are called with."""

    def __init__(self, heads: int):
        self.proposed, self.accepted = [0] * heads, [0] * heads
        self.steps = 0
        # drafts of the step that is being computed, and how many tokens of the answer were known before it
        self.drafts: list[int] | None = None
        self.known = 0

    def step(self, drafts: list[int], known: int) -> None:
        """A forward begins; `known`: tokens of the answer up to now."""
        if self.drafts is not None:
            # an answer that goes on has a token of the trunk behind the accepted drafts
            self._close(known - self.known - 1)
        self.drafts, self.known = drafts, known

    def finish(self, answer: list[int]) -> None:
        """`answer`: all its tokens; it may end with a draft."""
        if self.drafts is None:
            return
        taken = answer[self.known :]
        # a refused draft never comes back as the trunk's token: it had less probability than the head gave it
        self._close(sum(draft == token for draft, token in zip(self.drafts, taken)))
        self.drafts = None

    def _close(self, accepted: int) -> None:
        self.steps += 1
        for head in range(len(self.drafts)):
            self.proposed[head] += 1
            self.accepted[head] += head < accepted


@dataclass(frozen=True)
class CacheUse:
    """Bytes of keys and values for `tokens` tokens: in layers of either kind, what is allocated with room to grow, and
    what all layers together would hold if each kept every token."""

    tokens: int = 0
    global_bytes: int = 0
    sliding_bytes: int = 0
    allocated: int = 0
    all_global: int = 0


class WebSession(ChatSession):
    """A ChatSession that can be looked at while it answers.

    layout: what the tokens of the last prompt stand for; None before the first one, and for a checkpoint that neither
    sees nor hears. layout, drafting, cache_use: replaced as a whole, so that another thread may read them at any time.
    """

    def reset(self) -> None:
        super().reset()
        self.layout: TokenLayout | None = None
        self.drafting: Drafting | None = None
        self.cache_use = CacheUse()
        self.prompt_tokens = 0
        self.stopping = False

    def render(self, messages: list[dict]) -> Any:
        inputs = super().render(messages)
        self.prompt_tokens = inputs["input_ids"].shape[1]
        if isinstance(self.processor, ProcessorMixin):
            self.layout = self.processor.explain(inputs)
        return inputs

    def answer(self, text: str, files: list[str], drafting: bool, thinking: bool, on_delta) -> dict[str, Any]:
        """The message that answers `text` and the media in `files`; `on_delta` gets its parts, as in `ask`.

        Raises:
            ValueError, OSError: a file that cannot be used, named without its folder.
        """
        self.thinking = thinking
        self.attached.clear()
        for path in files:
            try:
                self.attach(kind_of(path), path)
            except (ValueError, OSError) as error:
                self.attached.clear()
                raise ValueError(in_one_line(str(error).replace(path, os.path.basename(path)))) from error
        heads = self.model.model.mtp
        self.options["use_mtp"] = drafting and heads is not None
        self.meter = DraftMeter(len(heads.layers) if self.options["use_mtp"] else 0)
        self.drafting = Drafting(self.options["use_mtp"])
        with self.watched_forwards():
            return self.ask(text, on_delta)

    @contextmanager
    def watched_forwards(self):
        hook = self.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def before_forward(self, model, args, kwargs) -> None:
        listener = self.listener
        if self.stopping:
            listener.stop_requested = True
        # the prompt comes with the first call and the token of the prefill with the second
        if listener.calls >= 2:
            known = self.cache.get_seq_length() - self.prompt_tokens + 1
            self.meter.step(kwargs["input_ids"][0, 1:].tolist(), known)
            self.measure(known, time.perf_counter() - listener.prefilled)

    def measured(self, prompt: int, reused: int, answer: list[int]):
        turn = super().measured(prompt, reused, answer)
        self.meter.finish(answer)
        self.measure(turn.answer, turn.decode_seconds)
        return turn

    def measure(self, tokens: int, seconds: float) -> None:
        meter = self.meter
        self.drafting = replace(
            self.drafting,
            tokens=tokens,
            steps=meter.steps,
            proposed=tuple(meter.proposed),
            accepted=tuple(meter.accepted),
            seconds=seconds,
        )
        sizes = {True: 0, False: 0}
        for layer in self.cache.layers:
            sizes[layer.is_sliding] += sum(rows.nbytes for rows in layer.live_rows())
        cached = self.cache.get_seq_length()
        self.cache_use = CacheUse(
            tokens=cached,
            global_bytes=sizes[False],
            sliding_bytes=sizes[True],
            allocated=self.cache.nbytes()["total"],
            all_global=full_attention_bytes(self.model.config, cached, self.model.dtype.itemsize),
        )

    def stop(self) -> bool:
        """Ends the answer after the token that is being computed, or, before the first one, with it."""
        self.stopping = True
        return super().stop()


def kind_of(path: str) -> str:
    """ "image", "video" or "audio", by the name of a file. ValueError: another name."""
    guessed = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    kind = KINDS.get(Path(path).suffix.lower(), guessed)
    if kind not in ("image", "video", "audio"):
        raise ValueError(f"{path}: expected an image, a video or a sound, got a file named otherwise.")
    return kind


def in_one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(eq=False)
class Said:
    """A question with its files, and its answer as far as it has come; `seconds` of thinking once that is over."""

    text: str
    files: list[str]
    reasoning: str = ""
    content: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    thinking_since: float = 0.0
    thought_seconds: float | None = None
    done: bool = False

    def add(self, delta: dict[str, Any]) -> None:
        if "reasoning_content" in delta and not self.reasoning:
            self.thinking_since = time.perf_counter()
        if "reasoning_content" not in delta and self.reasoning and self.thought_seconds is None:
            self.thought_seconds = time.perf_counter() - self.thinking_since
        self.reasoning += delta.get("reasoning_content", "")
        self.content += delta.get("content", "")
        self.tool_calls += delta.get("tool_calls", [])


@dataclass
class Conversation:
    """What one user sees: `said` in turn, and of the last two answers with and without drafting what that brought."""

    session: WebSession
    said: list[Said] = field(default_factory=list)
    compared: dict[bool, Drafting] = field(default_factory=dict)
    job: Future | None = None

    @property
    def busy(self) -> bool:
        return self.job is not None and not self.job.done()

    def stop(self) -> None:
        """Ends the answer that is written, or takes the question back that waits for its turn."""
        if self.busy and not self.job.cancel():
            self.session.stop()


class Conversations:
    """One conversation per user, one answer at a time for all of them, in the order in which they ask.

    Args:
        options: of `ChatSession`.
    """

    def __init__(self, model, processor, **options):
        self.model, self.processor, self.options = model, processor, options
        self.lock = threading.Lock()
        self.users: dict[str, Conversation] = {}
        # one thread: the model computes one answer at a time
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mimo-demo")

    def of(self, user: str) -> Conversation:
        with self.lock:
            if user not in self.users:
                session = WebSession(self.model, self.processor, **self.options)
                self.users[user] = Conversation(session)
            return self.users[user]

    def drop(self, user: str) -> None:
        """Ends the conversation of a user; the next `of` begins another one."""
        with self.lock:
            conversation = self.users.pop(user, None)
        if conversation is not None:
            conversation.stop()

    def renew(self, user: str) -> Conversation:
        """Another conversation for a user, who still sees what drafting brought before."""
        compared = self.of(user).compared
        self.drop(user)
        conversation = self.of(user)
        conversation.compared = compared
        return conversation

    def is_current(self, user: str, conversation: Conversation) -> bool:
        return self.users.get(user) is conversation

    def ask(self, conversation: Conversation, text: str, files: list[str], drafting: bool, thinking: bool) -> Future:
        """Starts an answer, or puts it in the queue; `conversation.said[-1]` grows with it, and goes if it fails.

        ValueError: the conversation is busy with another one.
        """
        said, session = Said(text, files), conversation.session

        def work() -> None:
            try:
                session.answer(text, files, drafting, thinking, said.add)
            except BaseException:
                conversation.said.remove(said)
                raise
            said.done = True
            # an answer of one token has no speed
            if session.drafting.tokens_per_second:
                conversation.compared[session.drafting.on] = session.drafting

        def taken_back(job: Future) -> None:
            if job.cancelled():
                conversation.said.remove(said)

        with self.lock:
            if conversation.busy:
                raise ValueError("The last question is not answered yet.")
            # here and not in `work`, which may begin after somebody has stopped it
            session.stopping = False
            conversation.said.append(said)
            conversation.job = job = self.worker.submit(work)
        job.add_done_callback(taken_back)
        return job

    def stop(self) -> None:
        """Ends all answers after the token that is being computed."""
        for conversation in list(self.users.values()):
            conversation.stop()

    def close(self) -> None:
        """Ends all answers and waits for it: a thread inside of PyTorch at exit would bring the process down."""
        self.stop()
        self.worker.shutdown()
