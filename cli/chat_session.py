"""A conversation with a model that keeps its KV cache between turns; knows no terminal."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from modeling_mimo import HybridCache
from modeling_mimo.processors.media_loading_mimo_v2 import open_source
from modeling_mimo.processors.placeholders_mimo_v2 import ARGUMENTS, AUDIO, IMAGE, VIDEO
from modeling_mimo.processors.response_parsing_mimo_v2 import MiMoV2ResponseStreamParser


# one per turn: each holds a copy of the sliding windows (32 MiB in MiMo-V2.5) and maybe buffers the cache has outgrown
MAX_SNAPSHOTS = 4

PLACEHOLDERS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}


@dataclass
class Medium:
    """An image, a video or a sound of the conversation: its file is read once, and its digest tells it apart.

    item: what the processor takes: the bytes of the file, or of a sound its codes. grid: patches of what is seen.
    tokens: how many placeholders of each kind it has; a video with sound has some of "audio".
    """

    kind: str
    name: str
    key: str
    item: Any
    grid: list[int] | None
    tokens: dict[str, int]

    def __str__(self) -> str:
        seen = f"{' x '.join(map(str, self.grid))} patches, {self.tokens[self.kind]} tokens, " if self.grid else ""
        heard = f"{self.tokens['audio']} tokens of sound, " if self.tokens["audio"] else ""
        return f"{self.kind} {self.name}: {seen}{heard}".removesuffix(", ")


@dataclass
class Turn:
    """Numbers of one answer. `reused` of the `prompt` tokens were in the cache; `answer` tokens were generated."""

    prompt: int
    reused: int
    answer: int
    prefill_seconds: float
    decode_seconds: float
    stopped: str


class TextDecoder:
    """Token ids -> text as it becomes complete: characters of several bytes are never cut."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pending: list[int] = []

    def feed(self, token: int) -> str:
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        return "" if text.endswith("�") else self.close()

    def close(self) -> str:
        text, self.pending = self.tokenizer.decode(self.pending), []
        return text


class Listener(BaseStreamer, StoppingCriteria):
    """Follows `generate`: hands on parts of the message, remembers the end of the prompt, stops when asked to."""

    def __init__(self, tokenizer, parser: MiMoV2ResponseStreamParser, on_delta: Callable[[dict], None], on_prompt):
        self.decoder, self.parser = TextDecoder(tokenizer), parser
        self.on_delta, self.on_prompt = on_delta, on_prompt
        self.stop_requested = False
        self.calls = 0
        self.started = self.prefilled = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        # the first call brings the prompt; at the second the cache holds exactly the prompt
        if self.calls == 1:
            return
        if self.calls == 2:
            self.prefilled = time.perf_counter()
            self.on_prompt()
        self._hand_on(self.parser.feed(self.decoder.feed(int(value))))

    def end(self) -> None:
        self.ended = time.perf_counter()
        self._hand_on(self.parser.feed(self.decoder.close()) + self.parser.close())

    def _hand_on(self, deltas: list[dict]) -> None:
        for delta in deltas:
            self.on_delta(delta)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop_requested, device=input_ids.device)


class ChatSession:
    """Messages, the cache of their tokens, and what is attached to the next one.

    Every turn renders the whole conversation anew and compares it with what the cache holds, token by token and medium
    by medium: only what follows the common beginning is computed. An answer is therefore the one that the model gives
    without any cache.

    Args:
        processor: a `MiMoV2Processor`, or the tokenizer of a checkpoint for text.
        options: further arguments of `generate`.
    """

    def __init__(self, model, processor, system: str = "", thinking: bool = True, max_new_tokens=None, options=None):
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.system, self.thinking = system, thinking
        self.max_new_tokens = max_new_tokens or model.generation_config.max_new_tokens or 2048
        self.options = dict(options or {})
        self.attached: list[Medium] = []
        self.listener: Listener | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets messages, attachments and cache; keeps the settings."""
        self.messages: list[dict[str, Any]] = []
        self.media: list[list[Medium]] = []
        self.attached.clear()
        self.turns: list[Turn] = []
        self.inputs = None
        self.forget()

    def forget(self) -> None:
        """Empties the cache; the next turn computes everything."""
        self.cache = HybridCache(self.model.config)
        # a token id per cached token, for a placeholder the key of its medium
        self.cached: list[int | str] = []
        self.snapshots: list[tuple[int, Any]] = []

    def undo(self) -> None:
        """Takes back the last message and its answer. ValueError: there is none."""
        if not self.messages:
            raise ValueError("/undo: expected a message to take back, got an empty conversation.")
        del self.messages[-2:]
        self.media.pop()
        self.turns.pop()

    def attach(self, kind: str, source: str) -> Medium:
        """Reads an "image", a "video" or "audio" from a file or URL for the next message.

        Raises:
            ValueError, OSError: nothing readable there, or a model that cannot see or hear.
        """
        if not isinstance(self.processor, ProcessorMixin):
            raise ValueError(f"{source}: expected text only, this checkpoint neither sees nor hears.")
        if self.model.visual is None:
            raise ValueError(f"{source}: expected text only, the model was loaded without its towers.")
        data = read_bytes(kind, source)
        try:
            # codes, so that later turns need not hear again
            item = {"audio_codes": self.processor.get_audio_codes(data)[0]} if kind == "audio" else data
            inputs = self.processor(text=PLACEHOLDERS[kind], **{ARGUMENTS[kind]: [item]}, return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        grid = None if kind == "audio" else inputs[f"{kind}_grid_thw"][0].tolist()
        tokens = {name: int((inputs["input_ids"] == token).sum()) for name, token in self.placeholder_ids().items()}
        medium = Medium(kind, source, hashlib.sha256(data).hexdigest(), item, grid, tokens)
        self.attached.append(medium)
        return medium

    def placeholder_ids(self) -> dict[str, int]:
        processor = self.processor
        return {
            "image": processor.image_token_id,
            "video": processor.video_token_id,
            "audio": processor.audio_token_id,
        }

    def ask(self, text: str, on_delta: Callable[[dict], None] = lambda delta: None) -> dict[str, Any]:
        """The parsed answer to `text` and what is attached; both join the conversation.

        `on_delta` gets its parts while they are generated: mappings with `reasoning_content`, `content` or
        `tool_calls`. After an error the conversation is what it was before.
        """
        content = [{"type": medium.kind, medium.kind: medium.item} for medium in self.attached]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}] if content else text}
        inputs = self.render([*self.messages, message])
        media = [*self.media, list(self.attached)]
        keys = self.token_keys(inputs["input_ids"][0].tolist(), media)
        room = self.model.config.max_position_embeddings - len(keys)
        if room < 1:
            raise ValueError(f"context: expected at most {len(keys) + room - 1} tokens of prompt, got {len(keys)}.")
        parser = MiMoV2ResponseStreamParser(prefix=self.tokenizer.decode(inputs["input_ids"][0]))
        self.listener = Listener(self.tokenizer, parser, on_delta, lambda: self.remember(len(keys)))
        try:
            reused = self.roll_back_to(keys)
            output = self.model.generate(
                **inputs.to(self.model.device),
                cache=self.cache,
                streamer=self.listener,
                stopping_criteria=[self.listener],
                max_new_tokens=min(self.max_new_tokens, room),
                pad_token_id=self.tokenizer.pad_token_id,
                **self.options,
            )
            answer = output[0, len(keys) :].tolist()
            self.cached = [*keys, *answer][: self.cache.get_seq_length()]
            self.turns.append(self.measured(len(keys), reused, answer))
        except BaseException:
            # layers may hold different numbers of tokens
            self.forget()
            raise
        finally:
            self.listener = None
        self.messages += [message, parser.message]
        self.media, self.inputs = media, inputs
        self.attached.clear()
        return parser.message

    def render(self, messages: list[dict]) -> Any:
        """Inputs of the model for the system text, `messages` and the beginning of an answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.processor.apply_chat_template(
            [*system, *messages],
            add_generation_prompt=True,
            enable_thinking=self.thinking,
            sanitize_control_tokens=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def token_keys(self, ids: list[int], media: list[list[Medium]]) -> list[int | str]:
        """`ids` with the key of a medium at its placeholders: other pictures have the same ids."""
        if not isinstance(self.processor, ProcessorMixin):
            return ids
        flat = [medium for turn in media for medium in turn]
        keys = {
            token: iter([medium.key for medium in flat for _ in range(medium.tokens[kind])])
            for kind, token in self.placeholder_ids().items()
        }
        return [next(keys[token]) if token in keys else token for token in ids]

    def remember(self, length: int) -> None:
        """Keeps the state of the cache at `length` tokens, the end of a prompt."""
        self.snapshots.append((length, self.cache.snapshot()))
        del self.snapshots[:-MAX_SNAPSHOTS]

    def roll_back_to(self, keys: list[int | str]) -> int:
        """Makes the cache hold a beginning of `keys`, the longest it can; returns how many tokens that is."""
        pairs = zip(self.cached, keys)
        # the model needs at least one token to go on from
        common = min(next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.cached)), len(keys) - 1)
        self.snapshots = [(length, snapshot) for length, snapshot in self.snapshots if length <= common]
        try:
            self.cache.crop(common - len(self.cached))
            self.cached = self.cached[:common]
        except ValueError:
            # too far back for the sliding layers
            if not self.snapshots:
                self.forget()
                return 0
            length, snapshot = self.snapshots[-1]
            self.cache.restore(snapshot)
            self.cached = self.cached[:length]
        return len(self.cached)

    def measured(self, prompt: int, reused: int, answer: list[int]) -> Turn:
        listener, eos = self.listener, self.model.generation_config.eos_token_id
        ended = answer[-1] in (eos if isinstance(eos, list) else [eos])
        return Turn(
            prompt=prompt,
            reused=reused,
            answer=len(answer),
            prefill_seconds=listener.prefilled - listener.started,
            decode_seconds=listener.ended - listener.prefilled,
            stopped="end of turn" if ended else "interrupted" if listener.stop_requested else "max_new_tokens",
        )

    def stop(self) -> bool:
        """Ends the answer after the token that is being computed. False: it was told before, or there is none."""
        if self.listener is None or self.listener.stop_requested:
            return False
        self.listener.stop_requested = True
        return True

    def explain(self) -> str:
        """What the tokens of the last prompt stand for. ValueError: there was none."""
        if self.inputs is None:
            raise ValueError("/explain: expected a message before it, got none.")
        if isinstance(self.processor, ProcessorMixin):
            return str(self.processor.explain(self.inputs))
        ids = self.inputs["input_ids"][0]
        return f"{len(ids)} tokens, all text: {self.tokenizer.decode(ids)!r}"

    def stats(self) -> dict[str, Any]:
        """Numbers of the last turn and of the cache, in tokens, seconds and bytes."""
        last = asdict(self.turns[-1]) if self.turns else {}
        return {**last, "cached_tokens": len(self.cached), "cache_bytes": self.cache.nbytes()}


def read_bytes(kind: str, source: str) -> bytes:
    """What a file or an http(s) URL holds. ValueError, OSError: nothing of use."""
    is_url = source.startswith(("http://", "https://"))
    found = open_source(source if is_url else Path(source).expanduser(), kind)
    return Path(found).read_bytes() if isinstance(found, str) else found.getvalue()
