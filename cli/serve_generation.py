"""Running `generate` for a server: one answer after the other on one thread, streamed as parts of a message."""

import asyncio
from typing import Any

from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)

from modeling_mimo.processors.response_parsing_mimo_v2 import MiMoV2ResponseStreamParser


# seconds that the last answer gets to stop in when the server does
STOP_TIMEOUT = 10.0


class ResponseEvents:
    """MiMo's parser of answers with the interface of Transformers' ResponseParser, which its streamers drive.

    ended_by_itself: after `finalize`, whether the answer had come to a stop token or a stop string.
    """

    def __init__(self, tools: list[dict] | None, prefix: str, stop_strings: list[str]):
        self.parser = MiMoV2ResponseStreamParser(tools, prefix, stop_strings)
        self.initial_events: list[dict[str, Any]] = []
        self.ended_by_itself = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        return self._events(self.parser.feed(text))

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        self.ended_by_itself = self.parser.ended
        events = self._events(self.parser.close())
        return self.parser.message, events

    @staticmethod
    def _events(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        events = []
        for delta in deltas:
            for field, value in delta.items():
                if field == "tool_calls":
                    events += [{"type": "region_close", "field": field, "value": call} for call in value]
                else:
                    events.append({"type": "region_chunk", "field": field, "text": value})
        return events


class StreamFailure(_StreamError):
    """An error of `generate` in the queue of an answer."""

    def __init__(self, error: Exception):
        super().__init__(" ".join(str(error).split()))
        self.error = error


class MiMoV2GenerateManager(GenerateManager):
    """As in Transformers, whose own hands the processor to `generate` where stop strings need the tokenizer, tells a
    wrong request and a fault of the server apart by nothing, and leaves answers running when the server stops."""

    def __init__(self):
        super().__init__()
        self._streamers: set[DirectStreamer] = set()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        tokenizer = tokenizer_of(processor)
        streamer = DirectStreamer(tokenizer._tokenizer, loop, queue, response_parser=response_parser)
        self._streamers.add(streamer)

        def run() -> None:
            try:
                model.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=tokenizer)
            except _GenerationCancelled:
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:
                loop.call_soon_threadsafe(queue.put_nowait, StreamFailure(error))
            finally:
                self._streamers.discard(streamer)

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(self, model, processor, *args, **kwargs):
        return await super().generate_non_streaming(model, tokenizer_of(processor), *args, **kwargs)

    def cancel(self) -> None:
        """Tells all answers to end after the token that is being computed."""
        for streamer in list(self._streamers):
            streamer.cancel()

    def stop(self) -> None:
        """Ends all answers and waits for it: a thread inside of PyTorch at exit would bring the process down."""
        self.cancel()
        self.submit(lambda: None).result(timeout=STOP_TIMEOUT)


class OneModelState(GenerationState):
    """All endpoints use one manager, so that the model computes one answer at a time."""

    def __init__(self):
        super().__init__()
        self.manager = MiMoV2GenerateManager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> MiMoV2GenerateManager:
        return self.manager

    def shutdown(self) -> None:
        self.manager.stop()


def tokenizer_of(processor):
    """The tokenizer of a processor, or what is one already."""
    return processor.tokenizer if hasattr(processor, "tokenizer") else processor
