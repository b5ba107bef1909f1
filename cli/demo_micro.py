"""Runs `mimo demo`: loads a checkpoint, asks it, drafts with and without its MTP heads, and measures all of it."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from modeling_mimo import HybridCache, MiMoV2FP8Config
from modeling_mimo.training.micro_tasks import is_right

from . import demo_screen
from .demo import full_attention_bytes, layer_map, model_name, stored_as
from .demo_questions import Question, own, shipped
from .loading import read_config


MAX_NEW_TOKENS = 128
# turns that plain decoding and drafting take over all stories, after one story each that does not count
REPEATS = 2


def show(args, started: float) -> dict[str, Any]:
    """Prints the screen, or with `--json` the object that it returns; `started`: seconds of `time.perf_counter`.

    ValueError, OSError: a checkpoint that does not see and hear, or a file that cannot be used; before the model is
    loaded.
    """
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    say = demo_screen.quiet if args.json else demo_screen.say
    questions, stories = shipped()
    mine = own(args)
    config = read_config(args.path, omni=True)
    begin = time.perf_counter()
    processor = AutoProcessor.from_pretrained(args.path)
    load_seconds = time.perf_counter() - begin
    # all files are read before the model is, those of the user first, so that a wrong one is an error at once
    limit = args.max_new_tokens or MAX_NEW_TOKENS
    room = config.max_position_embeddings - limit
    prepared = [(question, *prepare(processor, question, room)) for question in mine]
    prepared = [(question, *prepare(processor, question, room)) for question in questions] + prepared
    begin = time.perf_counter()
    model = load_model(args)
    result = {"model": described(model, args.path, load_seconds + time.perf_counter() - begin)}
    say(demo_screen.header(result["model"]))
    result["questions"] = []
    for question, inputs, seconds in prepared:
        row = answered(model, processor, question, inputs, limit)
        row["seconds"] += seconds
        result["questions"].append(row)
        say(demo_screen.row(row))
    result["drafting"] = drafting(model, [prepare(processor, story, room)[0]["input_ids"] for story in stories], limit)
    say(demo_screen.drafting(result["drafting"]))
    result["cache"] = max((row["cache"] for row in result["questions"]), key=lambda cache: cache["tokens"])
    result["seconds"] = time.perf_counter() - started
    say(demo_screen.footer(result))
    return result


def load_model(args):
    quantization = {"quantization_config": MiMoV2FP8Config(dequantize=False)} if args.fp8_resident else {}
    return AutoModelForImageTextToText.from_pretrained(
        args.path, dtype=args.dtype, device_map=args.device_map, **quantization
    )


def described(model, path: str, seconds: float) -> dict[str, Any]:
    """What was loaded: parameters and stored bytes in all and per part of the model, its layers, dtype and device."""
    parts = model.load_report.parts
    return {
        "name": model_name(path),
        "path": path,
        "parameters": model.num_parameters(),
        "tensor_bytes": sum(part["bytes"] for part in parts.values()),
        # audio codec and tokenizer included; nothing of a repository's name
        "folder_bytes": sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()),
        "stored_as": stored_as(model.load_report),
        "parts": {name: part["parameters"] for name, part in parts.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": layer_map(model.config).strip().split("\n"),
        "load_seconds": seconds,
    }


def prepare(processor, question: Question, room: int) -> tuple[Any, float]:
    """Inputs of the model for a question, and the seconds that they took.

    ValueError: media that cannot be read, or more than `room` tokens.
    """
    begin = time.perf_counter()
    try:
        inputs = processor.apply_chat_template(
            question.messages,
            tools=question.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **question.options,
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{question.file or question.label}: {error}") from error
    length = inputs["input_ids"].shape[1]
    if length > room:
        raise ValueError(f"{question.file or question.label}: expected at most {room} tokens, got {length}.")
    return inputs, time.perf_counter() - begin


def answered(model, processor, question: Question, inputs, limit: int) -> dict[str, Any]:
    """The model's greedy answer to a question with what it cost."""
    cache = HybridCache(model.config)
    begin = time.perf_counter()
    output = model.generate(**inputs.to(model.device), cache=cache, max_new_tokens=limit, do_sample=False)
    seconds = time.perf_counter() - begin
    ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1]
    message = processor.parse_response(output[0, prompt:], prefix=ids[0], tools=question.tools)
    example = question.example
    return {
        "label": question.label,
        "file": question.file,
        "question": question.question,
        "reasoning": message.get("reasoning_content", ""),
        "answer": message["content"],
        "tool_calls": [call["function"] for call in message.get("tool_calls", [])],
        "expected": example and example["answer"],
        "right": example and is_right(example, message),
        "prompt_tokens": prompt,
        "media_tokens": media_tokens(processor, ids),
        "answer_tokens": output.shape[1] - prompt,
        "seconds": seconds,
        "cache": {
            "tokens": cache.get_seq_length(),
            "bytes": cache.nbytes(),
            "bytes_all_global": full_attention_bytes(model.config, cache.get_seq_length(), model.dtype.itemsize),
        },
    }


def media_tokens(processor, ids: torch.Tensor) -> dict[str, int]:
    """How many of the tokens stand for what is seen and heard, per kind that there is."""
    kinds = {"image": processor.image_token_id, "video": processor.video_token_id, "audio": processor.audio_token_id}
    counts = {kind: int((ids == token).sum()) for kind, token in kinds.items()}
    return {kind: count for kind, count in counts.items() if count}


def drafting(model, prompts: list[torch.Tensor], limit: int) -> dict[str, Any] | None:
    """Plain greedy decoding behind ids [1, tokens] beside drafting with the MTP heads; reading the prompts counts.

    None: a model without heads.
    """
    if model.model.mtp is None:
        return None
    modes = {"plain": {}, "mtp": {"use_mtp": True}}
    runs: dict[str, list] = {mode: [] for mode in modes}
    for options in modes.values():
        timed(model, prompts[0], limit, options)
    for _ in range(REPEATS):
        for mode, options in modes.items():
            runs[mode] += [timed(model, prompt, limit, options) for prompt in prompts]
    tokens = {mode: [run["tokens"] for run in runs[mode]] for mode in modes}
    speed = {mode: sum(map(len, tokens[mode])) / sum(run["seconds"] for run in runs[mode]) for mode in modes}
    return {
        "texts": len(prompts),
        "tokens": sum(map(len, tokens["plain"])) // REPEATS,
        "plain_tokens_per_second": speed["plain"],
        "mtp_tokens_per_second": speed["mtp"],
        **draft_counts(runs["mtp"]),
        "same_tokens": tokens["plain"] == tokens["mtp"],
    }


def timed(model, prompt: torch.Tensor, new_tokens: int, options: dict) -> dict[str, Any]:
    """Seconds, tokens and statistics of drafting of one greedy answer to ids [1, tokens]."""
    prompt = prompt.to(model.device)
    begin = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    # reading the tokens waits for the device
    tokens = output.sequences[0, prompt.shape[1] :].tolist()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": tokens, "stats": output.mtp_stats if options else None}


def draft_counts(runs: list[dict]) -> dict[str, Any]:
    """Drafts per head over answers of `timed` that were drafted, and tokens per forward behind the prefill."""
    stats = [run["stats"] for run in runs]
    proposed = [sum(head) for head in zip(*(one.proposed for one in stats))]
    accepted = [sum(head) for head in zip(*(one.accepted for one in stats))]
    forwards = sum(row["forwards"] for one in stats for row in one.rows)
    return {
        # an answer of one token needs no forward behind the prefill
        "mean_accepted_length": 1 + sum(accepted) / max(1, forwards),
        "proposed": proposed,
        "accepted": accepted,
    }
