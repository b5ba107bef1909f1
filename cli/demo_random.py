"""`mimo demo --random`: a small random checkpoint in the released format, loaded and used like the real one."""

import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import torch
from transformers import TextStreamer

from modeling_mimo import HybridCache
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint

from .chat import Printer
from .chat_session import ChatSession
from .demo import MEDIA, full_attention_bytes, layer_map, read_text
from .demo_questions import read
from .loading import load


MAX_NEW_TOKENS = 48


def show(args) -> None:
    """Writes, loads, reads and answers, and prints what happens."""
    text = read(args.text[0]) if args.text else read_text(None)
    max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch) / "checkpoint"
        model, processor = write_and_load(folder, args)
        ids = processor.tokenizer(text, return_tensors="pt").input_ids
        ids = ids[:, : model.config.max_position_embeddings - max_new_tokens]
        generate(model, processor.tokenizer, ids, max_new_tokens)
        media = [(kind, source) for kind in MEDIA for source in vars(args)[kind]]
        if media:
            print()
            answer_about(media, model, processor, max_new_tokens)
    print("(random weights: what the model writes is noise)")


def write_and_load(folder: Path, args) -> tuple:
    """Model and processor of a new random checkpoint in `folder`."""
    start = time.perf_counter()
    write_random_checkpoint(folder, size=args.size or "demo", seed=args.seed or 0, vision=True, audio=True)
    names = sorted(path.name for path in folder.iterdir())
    print(f"wrote {folder} in {time.perf_counter() - start:.1f} s: {', '.join(names)}\n")

    start = time.perf_counter()
    model, processor = load(Namespace(**vars(args) | {"path": str(folder), "towers": True}))
    print(f"loaded {type(model).__name__} and {type(processor).__name__} in {time.perf_counter() - start:.1f} s")
    print(f"{model.load_report}\n")
    print(layer_map(model.config))
    return model, processor


def generate(model, tokenizer, ids, max_new_tokens: int) -> None:
    """Prints how the model reads `ids` [1, tokens] and what it goes on with."""
    ids = ids.to(model.device)
    cache = HybridCache(model.config)
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids[:, :-1], cache=cache, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    print(f"prompt: {ids.shape[1]:,} tokens, read in {prefill:.2f} s ({ids.shape[1] / prefill:,.0f} tokens/s)\n")
    tail = tokenizer.decode(ids[0, -40:]).strip().replace("\n", " ")
    print(f"...{tail} >>>", end=" ")
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
    )
    seconds = time.perf_counter() - start
    new = output.shape[1] - ids.shape[1]
    print(f"\ngenerated {new} tokens in {seconds:.2f} s ({new / seconds:.1f} tokens/s)")
    print(cache_line(cache, model))
    sys.stdout.flush()


def answer_about(media: list[tuple[str, str]], model, processor, max_new_tokens: int) -> None:
    """Prints the layout of a question about the media, pairs of kind and source, and the answer to it."""
    session = ChatSession(model, processor, max_new_tokens=max_new_tokens)
    for kind, source in media:
        print(session.attach(kind, source))
    question = f"What is in the {' and the '.join(dict.fromkeys(kind for kind, _ in media))}?"
    print(f"\n{question} >>>", end=" ")
    printer = Printer()
    session.ask(question, printer.show)
    printer.close()
    print(f"\n{session.explain()}\n")
    stats = session.stats()
    print(
        f"prompt: {stats['prompt']:,} tokens, read in {stats['prefill_seconds']:.2f} s with what is seen and heard; "
        f"generated {stats['answer']} tokens in {stats['decode_seconds']:.2f} s"
    )
    print(cache_line(session.cache, model))


def cache_line(cache, model) -> str:
    """What a cache holds, in MiB, beside what it would hold if every layer kept all tokens."""
    held, full = cache.nbytes(), full_attention_bytes(model.config, cache.get_seq_length(), model.dtype.itemsize)
    return (
        f"KV cache for {cache.get_seq_length():,} tokens: {held['total'] / 2**20:.1f} MiB "
        f"(global {held['full_attention'] / 2**20:.1f}, sliding {held['sliding_attention'] / 2**20:.1f}); "
        f"all layers global would need {full / 2**20:.1f} MiB"
    )
