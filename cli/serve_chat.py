"""The endpoint /v1/chat/completions of `mimo serve`."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat import ChatCompletionMessageToolCall
from openai.types.chat.chat_completion_chunk import ChatCompletionChunk, ChoiceDeltaToolCall
from openai.types.completion_usage import CompletionUsage
from transformers import ProcessorMixin
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import DirectStreamer, ReasoningText, ToolCall, set_torch_seed

from .serve_generation import ResponseEvents, StreamFailure, tokenizer_of
from .serve_requests import (
    MediaPolicy,
    chat_messages,
    chat_tools,
    check_fields,
    generation_settings,
    stop_strings,
    template_variables,
)


# where neither request nor checkpoint say
DEFAULT_MAX_TOKENS = 1024

# what a wrong request raises
REQUEST_ERRORS = (ValueError, OSError, NotImplementedError)

# set when the client of the request that is being handled has gone
CLIENT_GONE: ContextVar[asyncio.Event] = ContextVar("client_gone")


@dataclass
class Answer:
    """An answer that is being generated. limit: its longest length in tokens."""

    id: str
    model: str
    prompt_tokens: int
    limit: int
    events: ResponseEvents
    queue: asyncio.Queue
    streamer: DirectStreamer
    with_usage: bool

    async def parts(self) -> AsyncIterator[str | ReasoningText | ToolCall]:
        """Text, reasoning and calls of tools as they come. Ends early, and `generate` with it, when the client goes.

        Raises what `generate` raised.
        """
        watching = asyncio.create_task(self._stop_without_client())
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, StreamFailure):
                    raise item.error
                yield item
        finally:
            watching.cancel()
            self.streamer.cancel()

    async def _stop_without_client(self) -> None:
        await CLIENT_GONE.get().wait()
        self.streamer.cancel()

    def finish_reason(self, has_calls: bool) -> str:
        if has_calls:
            return "tool_calls"
        full = self.streamer.total_tokens >= self.limit
        return "length" if full and not self.events.ended_by_itself else "stop"

    def call_id(self, index: int) -> str:
        return f"{self.id}_tool_call_{index}"

    def usage(self) -> CompletionUsage:
        answered = self.streamer.total_tokens
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=answered,
            total_tokens=self.prompt_tokens + answered,
        )


class MiMoV2ChatHandler(ChatCompletionHandler):
    """As in Transformers, with MiMo's own reading of messages, media and answers.

    Transformers' own drops the reasoning and the text of earlier messages with calls, reads files of the server for
    any client, ignores what it cannot do, and lets the model go on when a client that does not stream leaves.

    thinking: whether the model thinks where a request does not say; None: as the chat template does.
    """

    def __init__(self, model_manager, generation_state, policy: MediaPolicy, thinking: bool | None, use_mtp: bool):
        super().__init__(model_manager, generation_state)
        self.policy, self.thinking, self.use_mtp = policy, thinking, use_mtp
        # of the processor: a codec that is being loaded, and padding that is set in the tokenizer
        self.rendering = asyncio.Lock()

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """The answer, whole or as a stream. HTTPException: 400 with one line for a request that cannot be answered."""
        try:
            answer = await self.started(body, request_id)
            parts = answer.parts()
            # errors of `generate` come before the first part, when the status can still say so
            first = await anext(parts, None)
        except REQUEST_ERRORS as error:
            raise HTTPException(400, " ".join(str(error).split())) from error
        if body.get("stream"):
            return StreamingResponse(self.stream(answer, first, parts), media_type="text/event-stream")
        return JSONResponse(await self.whole(answer, first, parts))

    async def started(self, body: dict, request_id: str) -> Answer:
        """Checks the request, makes the model's inputs and lets `generate` begin. Raises REQUEST_ERRORS."""
        check_fields(body)
        model_id, model, processor = self._resolve_model(body)
        tools, stops = chat_tools(body), stop_strings(body)
        has_senses = isinstance(processor, ProcessorMixin) and model.visual is not None
        messages = chat_messages(body, self.policy, has_senses)
        variables = template_variables(body, self.thinking)
        async with self.rendering:
            # media may have to be downloaded and decoded; other answers go on meanwhile
            inputs = await asyncio.to_thread(self.rendered, processor, messages, tools, variables)
        config = self._build_generation_config(body, model.generation_config)
        length = inputs["input_ids"].shape[1]
        room = model.config.max_position_embeddings - length
        if room < 1:
            raise ValueError(f"messages: expected at most {length + room - 1} tokens of prompt, got {length}")
        config.max_new_tokens = min(config.max_new_tokens, room)
        config.stop_strings = stops or None
        tokenizer = tokenizer_of(processor)
        events = ResponseEvents(tools, tokenizer.decode(inputs["input_ids"][0]), stops)
        manager = self.generation_state.get_manager(model_id)
        if body.get("seed") is not None:
            # on the thread of `generate`, right before it
            manager.submit(set_torch_seed, body["seed"])
        queue, streamer = manager.generate_streaming(
            model, tokenizer, inputs.to(model.device), config, request_id=request_id, response_parser=events
        )
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return Answer(request_id, model_id, length, config.max_new_tokens, events, queue, streamer, with_usage)

    @staticmethod
    def rendered(processor, messages: list[dict], tools: list[dict] | None, variables: dict[str, Any]):
        return processor.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **variables,
        )

    def _build_generation_config(self, body: dict, model_generation_config, use_cb: bool = False):
        config = super()._build_generation_config(generation_settings(body), model_generation_config, use_cb)
        if config.max_new_tokens is None:
            # a `generation_config` of the request stands for all settings of the checkpoint
            config.max_new_tokens = model_generation_config.max_new_tokens or DEFAULT_MAX_TOKENS
        if body.get("temperature") is not None or body.get("top_p") is not None:
            # Transformers' own leaves a checkpoint that is greedy by default greedy
            config.do_sample = body.get("temperature") != 0
        if config.use_mtp is None:
            config.use_mtp = self.use_mtp
        return config

    async def whole(self, answer: Answer, first, parts: AsyncIterator) -> dict[str, Any]:
        """A ChatCompletion with the whole answer."""
        content, reasoning, calls = "", None, []
        async for part in chained(first, parts):
            if isinstance(part, ToolCall):
                function = {"name": part.name, "arguments": part.arguments}
                call_id = answer.call_id(len(calls))
                calls.append(ChatCompletionMessageToolCall(id=call_id, type="function", function=function))
            elif isinstance(part, ReasoningText):
                reasoning = (reasoning or "") + part
            else:
                content += part
        return self._build_completion(
            answer.id,
            content if content or not calls else None,
            answer.model,
            answer.finish_reason(bool(calls)),
            answer.usage(),
            calls or None,
            reasoning,
        )

    async def stream(self, answer: Answer, first, parts: AsyncIterator) -> AsyncIterator[str]:
        """Server-sent events: ChatCompletionChunks, then "[DONE]"."""
        calls = 0
        yield self._build_chunk_sse(answer.id, role="assistant", model=answer.model)
        try:
            async for part in chained(first, parts):
                delta = {}
                if isinstance(part, ToolCall):
                    function = {"name": part.name, "arguments": part.arguments}
                    call = ChoiceDeltaToolCall(
                        index=calls, type="function", id=answer.call_id(calls), function=function
                    )
                    delta, calls = {"tool_calls": [call]}, calls + 1
                else:
                    delta = {"reasoning_content" if isinstance(part, ReasoningText) else "content": str(part)}
                yield self._build_chunk_sse(answer.id, model=answer.model, **delta)
        except Exception as error:
            failure = {"message": " ".join(str(error).split()), "type": "server_error"}
            yield self.chunk_to_sse(json.dumps({"error": failure}))
            return
        yield self._build_chunk_sse(answer.id, model=answer.model, finish_reason=answer.finish_reason(calls > 0))
        if answer.with_usage:
            yield self.chunk_to_sse(self.usage_chunk(answer))
        yield self.chunk_to_sse("[DONE]")

    @staticmethod
    def usage_chunk(answer: Answer) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=answer.id,
            created=0,
            model=answer.model,
            choices=[],
            usage=answer.usage(),
            object="chat.completion.chunk",
        )


async def chained(first, rest: AsyncIterator) -> AsyncIterator:
    """`first`, unless there was none, and `rest`; what is left of `rest` is closed with it."""
    try:
        if first is not None:
            yield first
        async for part in rest:
            yield part
    finally:
        await rest.aclose()
