"""`mimo demo`: a small random checkpoint in the released format, loaded and used like the real one."""

import argparse
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from .chat import check_sources


MEDIA = ("image", "video", "audio")

EXAMPLE = """example:
  mimo demo --text README.md --image examples/media/chart.png --audio examples/media/speech.wav

The weights are random, so what it writes is noise; formats, loading, media, cache and speed are real.
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "demo",
        help="write a small random checkpoint in the released format, load it, let it read, see and hear",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="text file to continue (default: a text of the package)")
    for kind in MEDIA:
        parser.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            metavar="FILE|URL",
            help=f"{kind} file or URL to ask about; repeatable",
        )
    parser.add_argument("--max-new-tokens", type=int, default=48, help="tokens to generate (default: 48)")
    parser.add_argument(
        "--size", choices=("tiny", "demo"), default="demo", help="10M or 55M parameters (default: demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the checkpoint here and keep it")
    parser.add_argument("--fp8-resident", action="store_true", help="keep the weights FP8 in memory")
    return parser


def run(args) -> int:
    text = read_text(args.text)
    if args.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens`: expected at least 1, got {args.max_new_tokens}.")
    check_sources({kind: vars(args)[kind] for kind in MEDIA})
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch) / "checkpoint"
        show(folder, text, args)
    return 0


def read_text(path: Path | None) -> str:
    """The text to continue; a `ValueError` when the file is empty or not UTF-8."""
    source = path or files("modeling_mimo") / "data" / "tokenizer_text.txt"
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--text`: expected a UTF-8 text file, got {path} ({error.reason}).") from error
    if not text.strip():
        raise ValueError(f"`--text`: expected a file with text in it, got an empty one: {path}.")
    return text


def show(folder: Path, text: str, args) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from modeling_mimo import MiMoV2FP8Config
    from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint

    logging.set_verbosity_error()
    start = time.perf_counter()
    write_random_checkpoint(folder, size=args.size, seed=args.seed, vision=True, audio=True)
    names = sorted(path.name for path in folder.iterdir())
    print(f"wrote {folder} in {time.perf_counter() - start:.1f} s: {', '.join(names)}\n")

    start = time.perf_counter()
    quantization = {"quantization_config": MiMoV2FP8Config(dequantize=False)} if args.fp8_resident else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, **quantization)
    processor = AutoProcessor.from_pretrained(folder)
    print(f"loaded {type(model).__name__} and {type(processor).__name__} in {time.perf_counter() - start:.1f} s")
    print(f"{model.load_report}\n")
    print(layer_map(model.config))

    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    ids = ids[:, : model.config.max_position_embeddings - args.max_new_tokens]
    generate(model, processor.tokenizer, ids, args.max_new_tokens)
    media = [(kind, source) for kind in MEDIA for source in vars(args)[kind]]
    if media:
        print()
        answer_about(media, model, processor, args.max_new_tokens)
    print("(random weights: what the model writes is noise)")


def layer_map(config) -> str:
    """One line per layer type and one letter per layer: G global, S sliding; a small letter marks a dense MLP."""
    letters = [
        (layer_type[0] if mlp_type == "dense" else layer_type[0].upper()).replace("F", "G").replace("f", "g")
        for layer_type, mlp_type in zip(config.layer_types, config.mlp_layer_types)
    ]
    lines = [f"layers: {' '.join(letters)}   (G global, S sliding, small letter: dense MLP)"]
    for layer_type in dict.fromkeys(config.layer_types):
        geometry = config.attention_geometry(layer_type)
        window = f"window {geometry.window}" if geometry.window else "all keys"
        lines.append(
            f"  {layer_type}: {geometry.num_heads} heads on {geometry.num_key_value_heads} KV heads, "
            f"K {geometry.head_dim} V {geometry.v_head_dim}, {window}, {'' if geometry.has_sinks else 'no '}sinks"
        )
    return "\n".join(lines) + "\n"


def generate(model, tokenizer, ids, max_new_tokens: int) -> None:
    import torch
    from transformers import TextStreamer

    from modeling_mimo import HybridCache

    cache = HybridCache(model.config)
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    print(f"prompt: {ids.shape[1]:,} tokens, read in {prefill:.2f} s ({ids.shape[1] / prefill:,.0f} tokens/s)\n")
    tail = tokenizer.decode(ids[0, -40:]).strip().replace("\n", " ")
    print(f"...{tail} >>>", end=" ")
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
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
    from .chat import Printer
    from .chat_session import ChatSession

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


def full_attention_bytes(config, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values if every layer kept all tokens."""
    width = 0
    for layer_type in config.layer_types:
        geometry = config.attention_geometry(layer_type)
        width += geometry.num_key_value_heads * (geometry.head_dim + geometry.v_head_dim)
    return width * tokens * itemsize
