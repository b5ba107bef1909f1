"""Which tensors an `audio_tokenizer/` folder must hold, and whether it does: names, dtypes and shapes, no values."""

from pathlib import Path
from typing import Any, NamedTuple

from modeling_mimo.checkpoint_mimo_v2 import FLOAT_DTYPES, TensorInfo, read_header, read_json_object

from .random_audio import decoder_shapes, encoder_shapes


FOLDER = "audio_tokenizer"
CONFIG_NAME = f"{FOLDER}/config.json"
WEIGHTS_NAME = f"{FOLDER}/model.safetensors"

SIZES = (
    "d_model",
    "n_mels",
    "kernel_size",
    "avg_pooler",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_quantizers",
)
DECODER_SIZES = ("decoder_layers", "decoder_ffn_dim", "decoder_kernel_size", "nfft", "window_size")

# far above every release: 24 layers, 1024 dimensions, 20 levels of at most 1024 entries
LARGEST = 2**20
LARGEST_COUNT = 1024


class AudioTensor(NamedTuple):
    """`dtype` as released; encoder and decoder may also be another float, and only codebooks are always float32."""

    dtype: str
    shape: tuple[int, ...]


def read_audio_tokenizer_config(folder: str | Path) -> dict[str, Any]:
    """`audio_tokenizer/config.json` of a checkpoint, its sizes checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a size that is missing, no positive int, or too large to make a table of.
    """
    path = Path(folder) / CONFIG_NAME
    config = read_json_object(path)
    for key in SIZES:
        most = LARGEST_COUNT if key in ("encoder_layers", "num_quantizers") else LARGEST
        if type(value := config.get(key)) is not int or not 1 <= value <= most:
            raise ValueError(f"{path}: `{key}`: expected an int of 1 to {most}, got {str(value)[:80]}.")
    sizes = config.get("codebook_size")
    levels = config["num_quantizers"]
    if not isinstance(sizes, list) or any(type(size) is not int or not 1 <= size <= LARGEST for size in sizes):
        raise ValueError(f"{path}: `codebook_size`: expected a list of ints, got {str(sizes)[:80]}.")
    if len(sizes) < levels:
        raise ValueError(f"{path}: `codebook_size`: expected num_quantizers={levels} sizes, got {len(sizes)}.")
    return config


def audio_tokenizer_table(config: dict[str, Any]) -> dict[str, AudioTensor]:
    """Every tensor of the encoder by name: 449 in V2.5. `config` as `read_audio_tokenizer_config` returns it."""
    table = {name: AudioTensor("BF16", shape) for name, shape in encoder_shapes(config)}
    for level, entries in enumerate(config["codebook_size"][: config["num_quantizers"]]):
        prefix = f"encoder.quantizer.vq.layers.{level}._codebook."
        for name, shape in (
            ("cluster_size", (entries,)),
            ("embed", (entries, config["d_model"])),
            ("embed_avg", (entries, config["d_model"])),
            ("inited", (1,)),
        ):
            table[prefix + name] = AudioTensor("F32", shape)
    return table


def compare_audio_tokenizer(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> list[str]:
    """One line per kind of difference between a file and its config; the decoder (V2.6) may be there or not."""
    table = audio_tokenizer_table(config)
    missing = [name for name in table if name not in tensors]
    if any(name.startswith("decoder.") for name in tensors):
        # the decoder is read by nobody here, so a config that does not describe it is no problem
        if all(type(config.get(key)) is int and 1 <= config[key] <= LARGEST_COUNT * 16 for key in DECODER_SIZES):
            table |= {name: AudioTensor("F32", shape) for name, shape in decoder_shapes(config)}
        else:
            tensors = {name: info for name, info in tensors.items() if not name.startswith("decoder.")}
    unknown = [name for name in tensors if name not in table]
    shared = [(name, table[name], info) for name, info in tensors.items() if name in table]
    mis_shaped = [
        f"{name} ({list(spec.shape)}, {list(info.shape)})" for name, spec, info in shared if spec.shape != info.shape
    ]
    wrong_dtype = [f"{name} ({info.dtype})" for name, _, info in shared if info.dtype not in FLOAT_DTYPES]
    return [
        f"{WEIGHTS_NAME}: {what} ({len(names)}): {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("mis-shaped (expected, got)", mis_shaped),
            ("wrong dtype", wrong_dtype),
        )
        if names
    ]


def check_audio_tokenizer(folder: str | Path) -> tuple[dict[str, TensorInfo], list[str]]:
    """(headers, problems) of `audio_tokenizer/` in a checkpoint's folder, by its own config; never raises for them."""
    folder = Path(folder)
    try:
        tensors = read_header(folder / WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        return {}, [str(error)]
    try:
        config = read_audio_tokenizer_config(folder)
    except (OSError, ValueError) as error:
        return tensors, [str(error)]
    return tensors, compare_audio_tokenizer(config, tensors)
