"""The audio tokenizer at MiMo-V2.5's size: real time, its bare matrix products, memory of an hour, windows.

    python benchmarks/hearing.py --repeats 3

The floor is the tokenizer's own matrix products and nothing else: those with weights (layers, convolutions,
codebooks), and queries with keys and weights with values, which are products as well: half of them for causal layers
in blocks of 512 queries, two windows of keys per window of queries for sliding ones. Memory is measured in a process
of its own per length (Linux): the peak of everything from a WAV file at 16 kHz to its codes, weights included.
Windows: one sliding layer's attention on sound of 1, 4 and 16 minutes as one segment.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from common import (
    GIB,
    Bar,
    child_task,
    finish,
    interleaved,
    parse,
    parser,
    reset_peak,
    resident_bytes,
    run_child,
)
from torch import nn

from modeling_mimo.processors import MiMoAudioTokenizer, MiMoAudioTokenizerConfig, MiMoV2FeatureExtractor
from modeling_mimo.processors.audio_codes_mimo_v2 import Sound, encode_sounds
from modeling_mimo.processors.audio_files_mimo_v2 import open_audio


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
QUICK = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
# mel frames of a minute, which is a segment
MINUTE = 6000
FILE_RATE = 16000
# rows of a sliding layer on sound of 1, 4 and 16 minutes
ROWS = (MINUTE // 2, 2 * MINUTE, 8 * MINUTE)


def random_tokenizer(fields: dict, dtype: torch.dtype) -> MiMoAudioTokenizer:
    torch.manual_seed(0)
    tokenizer = MiMoAudioTokenizer(MiMoAudioTokenizerConfig(**fields)).eval()
    return tokenizer.to(dtype)


def floor(tokenizer: MiMoAudioTokenizer, minutes: int):
    """Every matrix product of the tokenizer for so many segments of a minute, on inputs that were there before."""
    encoder = tokenizer.encoder
    frames = minutes * MINUTE
    products = [(frames, encoder.conv1.weight.flatten(1)), (frames // 2, encoder.conv2.weight.flatten(1))]
    products += [(frames // 2, module.weight) for module in encoder.modules() if isinstance(module, nn.Linear)]
    products.append((frames // 4, encoder.down_sample_layer[0].weight.flatten(1)))
    # distances to the codebooks are always float32
    products += [(frames // 4, level._codebook.embed.float()) for level in encoder.quantizer.vq.layers]
    inputs = {
        (rows, weight.shape[1], weight.dtype): torch.randn(rows, weight.shape[1], dtype=weight.dtype)
        for rows, weight in products
    }

    def run():
        for rows, weight in products:
            F.linear(inputs[rows, weight.shape[1], weight.dtype], weight)

    return run


def attention_floor(tokenizer: MiMoAudioTokenizer, minutes: int):
    """Every product of queries with keys and of weights with values, in the dtype of the weights."""
    config, dtype = tokenizer.config, tokenizer.encoder.conv1.weight.dtype
    heads, width, size = config.num_attention_heads, config.head_dim, config.sliding_window
    rows = MINUTE // 2
    states = torch.randn(heads, rows, width, dtype=dtype)
    blocks = torch.randn(heads * -(-rows // size), size, width, dtype=dtype)
    seen = torch.randn(len(blocks), 2 * size, width, dtype=dtype)

    def run():
        for _ in range(minutes):
            for kind in config.layer_types:
                if kind == "sliding_attention":
                    torch.bmm(torch.bmm(blocks, seen.transpose(1, 2)), seen)
                    continue
                for start in range(0, rows, 512):
                    keys = states[:, : start + 512]
                    torch.bmm(torch.bmm(states[:, start : start + 512], keys.transpose(1, 2)), keys)

    return run


def write_sound(path: Path, minutes: int) -> None:
    """A mono WAV of noise that swells each second, written a minute at a time."""
    random = np.random.default_rng(0)
    swell = np.sin(np.pi * np.arange(60 * FILE_RATE) / FILE_RATE) ** 2
    with soundfile.SoundFile(path, "w", FILE_RATE, 1, "PCM_16") as file:
        for _ in range(minutes):
            file.write(0.2 * swell * random.standard_normal(len(swell)))


@torch.inference_mode()
def peak_memory(task: dict) -> dict:
    """Peak bytes of this fresh process while it encodes a file, and of that what came on top of the weights."""
    tokenizer, extractor = random_tokenizer(task["config"], DTYPES[task["dtype"]]), MiMoV2FeatureExtractor()
    before = reset_peak()
    (codes,) = encode_sounds(extractor, tokenizer, [Sound(open_audio(task["path"], "audio[0]", FILE_RATE))])
    peak = resident_bytes("VmHWM")
    return {"peak": peak, "extra": peak - before, "codes": len(codes)}


@torch.inference_mode()
def measure_speed(fields: dict, dtype: torch.dtype, minutes: int, repeats: int) -> dict[str, float]:
    """Median seconds of encoding segments of a minute, and of the bare products of either kind."""
    tokenizer = random_tokenizer(fields, dtype)
    segments = [torch.randn(MINUTE, 128) for _ in range(minutes)]
    functions = {
        "ours": lambda: list(tokenizer.encode_segments(segments)),
        "products with weights": floor(tokenizer, minutes),
        "products of attention": attention_floor(tokenizer, minutes),
    }
    return interleaved(functions, repeats)


@torch.inference_mode()
def measure_windows(fields: dict, dtype: torch.dtype, lengths: tuple, repeats: int) -> tuple[dict[int, float], float]:
    """Median seconds of the attention of one sliding layer per length in rows, and how far its output on the shortest
    is from that of one dense mask."""
    tokenizer = random_tokenizer({**fields, "num_hidden_layers": 2, "skip_layer_id": 1}, dtype)
    attention, config = tokenizer.encoder.layers[0].self_attn, tokenizer.config
    functions = {}
    for rows in lengths:
        packing = tokenizer.encoder.packing([rows], torch.empty(0, dtype=dtype))
        states = torch.randn(rows, config.num_attention_heads, config.head_dim)
        functions[rows] = lambda states=states, packing=packing: attention.attend_window(
            states, states, states, packing
        )
        if rows == lengths[0]:
            exact = dense_window(states, config.sliding_window)
            apart = ((functions[rows]()[:rows] - exact).norm() / exact.norm()).item()
    return interleaved(functions, 3 * repeats), apart


def dense_window(states: torch.Tensor, window: int) -> torch.Tensor:
    """Attention [rows, heads, D] of each row to itself and the `window` rows before it, from all rows at once."""
    places = torch.arange(len(states))
    back = places[:, None] - places
    rows = states.transpose(0, 1)
    return F.scaled_dot_product_attention(rows, rows, rows, (back >= 0) & (back <= window)).transpose(0, 1)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    if task := child_task(arguments):
        print(json.dumps(peak_memory(task)))
        return 0
    options = parser("The audio tokenizer against real time and bare products.", "hearing.py --dtype float32")
    options.add_argument("--minutes", type=int, default=None, help="segments of a minute at a time (default: 2)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16, as released")
    options = parse(options, arguments, repeats=3)
    fields, dtype = QUICK if options.quick else {}, DTYPES[options.dtype]
    lengths, rows_of_layer = ((1, 2), ROWS[:1]) if options.quick else ((5, 60), ROWS)
    count = options.minutes or (1 if options.quick else 2)
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in lengths:
            path = Path(folder) / f"{minutes}.wav"
            write_sound(path, minutes)
            task = {"threads": options.threads, "dtype": options.dtype, "config": fields, "path": str(path)}
            memory[minutes] = run_child(__file__, task, peak_memory if options.quick else None)
    speed = measure_speed(fields, dtype, count, options.repeats)
    windows, apart = measure_windows(fields, dtype, rows_of_layer, options.repeats)
    rows = [[f"encoding {count} min", side, took, 60 * count / took] for side, took in speed.items()]
    rows += [["attention of one sliding layer", f"{length} rows", took, None] for length, took in windows.items()]
    per_row = [took / length for length, took in windows.items()]
    growth = memory[lengths[1]]["peak"] / memory[lengths[0]]["peak"]
    products = speed["products with weights"] + speed["products of attention"]
    judged = [products / speed["ours"], growth, max(per_row) / per_row[0]]
    judged = [None if options.quick else value for value in judged]
    # 100 mel frames a second and one at the end, and a code frame for each four
    miscounted = sum(abs(found["codes"] - -(-(6000 * minutes + 1) // 4)) for minutes, found in memory.items())
    bars = [
        Bar("code frames too many or too few", miscounted, 0, at_least=False),
        Bar("windowed attention's difference from one dense mask, relative", apart, 1e-4, at_least=False),
        Bar("bare matrix products' time against the tokenizer's", judged[0], 0.6),
        Bar(f"peak memory of {lengths[1]} min against {lengths[0]} min", judged[1], 1.5, at_least=False),
        Bar("windowed attention's time per row, 4 and 16 times the rows", judged[2], 1.3, at_least=False),
    ]
    notes = [
        f"{minutes} min of WAV to {found['codes']:,} code frames: peak {found['peak'] / GIB:.2f} GiB, "
        f"{found['extra'] / GIB:.2f} GiB of it on top of the loaded weights."
        for minutes, found in memory.items()
    ]
    config = MiMoAudioTokenizerConfig(**fields)
    setting = (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, segments of a minute; {options.dtype}, "
        f"random weights; median of {options.repeats}, windows of {3 * options.repeats}."
    )
    return finish(options.json, setting, ["what", "side", "s", "times real time"], rows, bars, notes)


if __name__ == "__main__":
    sys.exit(main())
