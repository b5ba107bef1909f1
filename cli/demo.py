"""`mimo demo`: the model of the package reads, sees, watches and hears, drafts, and shows its cache, on one screen."""

import argparse
import json
import os
import time
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from .chat import check_sources
from .loading import check_path


MEDIA = ("image", "video", "audio")

EXAMPLE = """examples:
  mimo demo
  mimo demo --image photo.png --audio tone.wav --video clip.mp4
  mimo demo --image photo.png --ask "What colour is the shape?"
  mimo demo --web
  mimo demo --random --text README.md --image examples/media/chart.png

Without PATH it runs MiMo-Micro, which the package ships: a small model in the released format that knows drawn shapes
and their motion, tones and short texts, and nothing else. Its answers are its own, and so are its mistakes. With
--random the weights are random: what it writes is noise; formats, loading, media, cache and speed are real.
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "demo",
        help="let the small model of the package read, see, watch and hear, on one screen or a web page",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", nargs="?", help="another checkpoint (default: the shipped MiMo-Micro)")
    for kind, article in (("image", "an"), ("video", "a"), ("audio", "an"), ("text", "a")):
        what = f"also ask about {article} {kind} file of yours; repeatable"
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE|URL", help=what)
    parser.add_argument("--ask", metavar="QUESTION", help="what to ask about your files (default: what is in them)")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens (default: 128, --random: 48)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--device-map", default="auto", help="cpu, cuda, auto, ... (default: auto)")
    parser.add_argument("--fp8-resident", action="store_true", help="keep the weights FP8 in memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all that was measured")
    web = parser.add_argument_group("web page")
    web.add_argument("--web", action="store_true", help="serve a page to chat on, in the browser of this machine")
    web.add_argument("--port", type=int, default=7860, help="its port, 0 for a free one (default: 7860)")
    noise = parser.add_argument_group("random weights")
    what = "write a random checkpoint in the released format, load it, let it read --text and your media"
    noise.add_argument("--random", action="store_true", help=what)
    noise.add_argument("--size", choices=("tiny", "demo"), help="10M or 55M parameters (default: demo)")
    noise.add_argument("--seed", type=int, help="seed of the random weights (default: 0)")
    noise.add_argument("--keep", type=Path, metavar="FOLDER", help="write the checkpoint here and keep it")
    return parser


def run(args) -> int:
    """0. Raises ValueError or OSError for bad input, before a model is loaded where that is possible."""
    started = time.perf_counter()
    check(args)
    if args.random:
        from .demo_random import show

        show(args)
        return 0
    if args.path is None:
        from modeling_mimo import micro

        args.path = micro()
    check_path(args.path)
    if args.web:
        if find_spec("gradio") is None:
            raise ValueError("`--web`: expected gradio to be installed: pip install 'modeling-mimo[web]'.")
        from .demo_web import serve

        return serve(args)
    from .demo_micro import show

    result = show(args, started)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    return 0


def check(args) -> None:
    """Raises ValueError for options that do not go together, FileNotFoundError for files that are not there."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"`--max-new-tokens`: expected at least 1, got {args.max_new_tokens}.")
    if args.ask is not None and not args.ask.strip():
        raise ValueError("`--ask`: expected a question, got an empty one.")
    given = [kind for kind in (*MEDIA, "text") if vars(args)[kind]]
    if args.ask is not None and not given:
        raise ValueError("`--ask`: expected a file of yours with it (--image, --video, ...), got none.")
    check_sources({kind: vars(args)[kind] for kind in given})
    for option, value in (("--size", args.size), ("--seed", args.seed), ("--keep", args.keep)):
        if value is not None and not args.random:
            raise ValueError(f"`{option}`: expected `--random` with it, got it alone.")
    if args.random:
        refuse("--random", {"PATH": args.path, "--ask": args.ask, "--json": args.json, "--web": args.web})
        if len(args.text) > 1:
            raise ValueError(f"`--text`: expected one file with `--random`, got {len(args.text)}.")
    if args.web:
        refuse("--web", {"--json": args.json, **{f"--{kind}": vars(args)[kind] for kind in given}})


def refuse(option: str, others: dict) -> None:
    """Raises ValueError where one of the options that `option` excludes is given."""
    for other, value in others.items():
        if value:
            raise ValueError(f"`{option}`: expected no {other} with it, got one.")


def read_text(path: Path | None) -> str:
    """The text of a file, by default one of the package; a `ValueError` when it is empty or not UTF-8."""
    source = path or files("modeling_mimo") / "data" / "tokenizer_text.txt"
    return decoded(source.read_bytes(), source)


def decoded(data: bytes, source) -> str:
    """`data` of `source` as text; a `ValueError` when it is empty or not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`--text`: expected a UTF-8 text file, got {source} ({error.reason}).") from error
    if not text.strip():
        raise ValueError(f"`--text`: expected a file with text in it, got an empty one: {source}.")
    return text


def model_name(path: str) -> str:
    """What people call the checkpoint at `path`."""
    from modeling_mimo import micro

    return "MiMo-Micro" if path == micro() else os.path.basename(os.path.abspath(path))


def stored_as(report) -> str:
    """What the weights of a model with this `load_report` are in its files."""
    return "FP8" if report.fp8 else "MXFP4" if report.mxfp4 else "floats"


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


def full_attention_bytes(config, tokens: int, itemsize: int) -> int:
    """Bytes of keys and values if every layer kept all tokens."""
    width = 0
    for layer_type in config.layer_types:
        geometry = config.attention_geometry(layer_type)
        width += geometry.num_key_value_heads * (geometry.head_dim + geometry.v_head_dim)
    return width * tokens * itemsize
