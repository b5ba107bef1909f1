"""The released files of MiMo-V2.5 with their true headers and sizes, and holes where the weights would be.

    python -m modeling_mimo.conversion.sparse_release /tmp/MiMo-V2.5
    python -m modeling_mimo.conversion.sparse_release /tmp/one-layer --layer 1

315 GB apparent take about 16 MB on disk, so that tools meet the real names, shapes, files and index. Source of names,
dtypes, shapes and files: the tensor list in the package. The order inside a file is that of the safetensors library
(dtypes from wide to narrow, then names); with it every file has the published size, and the index the published hash.

With `layer` only one MoE layer is written, in released geometry and with random values: a checkpoint of its own,
6.7 GB for V2.5, that can be converted end to end.
"""

import argparse
import copy
import gzip
import hashlib
import json
import math
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from modeling_mimo.checkpoint_mimo_v2 import DTYPE_BITS, INDEX_NAME, TensorInfo

from .audio_tokenizer_table import CONFIG_NAME, WEIGHTS_NAME, audio_tokenizer_table
from .random_audio import audio_tokenizer_config
from .random_common import new_folder, random_tensor, write_json
from .random_media import PREPROCESSOR_STUB


DATA = resources.files("modeling_mimo") / "data"
RELEASE = "MiMo-V2.5"
MANIFEST_NAME = "tensor_manifest.tsv.gz"

# released files have this in their index; the number of chunks of a fused projection
TP_SIZE = 4

# a layer alone keeps its geometry and gets a small vocabulary, which is not part of it
LAYER_VOCABULARY = 1024

TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def read_released_manifest(release: str = RELEASE) -> dict[str, TensorInfo]:
    """Every tensor of a release by name, `file` a bare file name. ValueError: the package has no list of it."""
    path = DATA / release / MANIFEST_NAME
    if not path.is_file():
        known = sorted(entry.name for entry in DATA.iterdir() if (entry / MANIFEST_NAME).is_file())
        raise ValueError(f"release: expected one of {', '.join(known)}, got {release!r}.")
    tensors, files = {}, {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
        name, dtype, dims, file = line.split("\t")
        tensors[name] = _info(dtype, tuple(map(int, dims.split("x"))), files.setdefault(file, Path(file)))
    return tensors


def write_sparse_release(folder: str | os.PathLike, release: str = RELEASE) -> Path:
    """Write all released weight files as sparse files, with index, config.json and `audio_tokenizer/`.

    Values read as zero, scales too. Files are written to `<folder>.partial`, which is renamed at the end.
    ValueError: no tensor list of `release`, or `folder` exists and is not an empty folder.
    OSError: the file system refuses a sparse file of this size.
    """
    tensors = read_released_manifest(release)
    audio_config = audio_tokenizer_config("full")
    audio = audio_tokenizer_table(audio_config)
    with new_folder(folder) as partial:
        _write_files(partial, tensors)
        _write_index(partial, tensors)
        (partial / "config.json").write_bytes((DATA / release / "config.json").read_bytes())
        write_json(partial / "preprocessor_config.json", PREPROCESSOR_STUB)
        (partial / CONFIG_NAME).parent.mkdir()
        write_json(partial / CONFIG_NAME, audio_config)
        _write_files(
            partial, {name: _info(spec.dtype, spec.shape, Path(WEIGHTS_NAME)) for name, spec in audio.items()}
        )
    return Path(folder)


def write_layer(
    folder: str | os.PathLike, layer: int = 1, release: str = RELEASE, seed: int = 0, experts: int | None = None
) -> Path:
    """Write one MoE layer of a release with random values, as a text-only checkpoint of one layer.

    Tensors keep their released shapes, dtypes and files; the layer is called 0, embeddings and head have 1024 rows.
    FP8 codes are uniform over all finite ones below 2 in magnitude, scales lie in [0.005, 0.02].

    experts: keep only so many of the layer's experts, 25 MB each; all of them by default.
    ValueError: not a layer with experts, or fewer than 1 or more than it has; else as `write_sparse_release`.
    """
    if not (DATA / release / "config.json").is_file():
        raise ValueError(f"release: expected one with a config.json in the package, got {release!r}.")
    values = json.loads((DATA / release / "config.json").read_bytes())
    sparse = [index for index, code in enumerate(values["moe_layer_freq"]) if code]
    if layer not in sparse:
        raise ValueError(f"layer: expected a layer with experts, {sparse[0]} to {sparse[-1]}, got {layer}.")
    most = values["n_routed_experts"]
    experts = most if experts is None else experts
    if not 1 <= experts <= most:
        raise ValueError(f"experts: expected 1 to {most}, got {experts}.")
    config = _config_of_layer(values, layer, experts)
    prefix = f"model.layers.{layer}."
    tensors = {}
    for name, info in read_released_manifest(release).items():
        own = name.removeprefix(prefix)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = _info(info.dtype, (LAYER_VOCABULARY, info.shape[1]), info.file)
        elif own.startswith("mlp.gate."):
            tensors[f"model.layers.0.{own}"] = _info(info.dtype, (experts, *info.shape[1:]), info.file)
        elif own.startswith("mlp.experts."):
            if int(own.split(".")[2]) < experts:
                tensors[f"model.layers.0.{own}"] = info
        elif own != name or name == "model.norm.weight":
            tensors[name if own == name else f"model.layers.0.{own}"] = info
    with new_folder(folder) as partial:
        offsets = _write_files(partial, tensors)
        for name, info in tensors.items():
            _fill(partial / info.file, offsets[name], name, info, seed)
        _write_index(partial, tensors)
        write_json(partial / "config.json", config)
    return Path(folder)


def _info(dtype: str, shape: tuple[int, ...], file: Path) -> TensorInfo:
    return TensorInfo(dtype, shape, math.prod(shape) * DTYPE_BITS[dtype] // 8, file)


def _write_files(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, int]:
    """Headers and holes of all files of `tensors`; returns the byte at which each tensor starts in its file."""
    files: dict[Path, list[str]] = {}
    for name, info in tensors.items():
        files.setdefault(info.file, []).append(name)
    starts = {}
    for file, names in files.items():
        header, position = {}, 0
        for name in sorted(names, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name)):
            info = tensors[name]
            offsets = [position, position + info.nbytes]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + position)
        starts |= {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
    return starts


def _write_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    total = sum(info.nbytes for info in tensors.values())
    weight_map = {name: tensors[name].file.name for name in sorted(tensors)}
    metadata = {"save_format": "fp8", "total_size": total, "tp_size": TP_SIZE}
    write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def _config_of_layer(values: dict[str, Any], layer: int, experts: int) -> dict[str, Any]:
    config = copy.deepcopy(values)
    for key in [key for key in config if key.startswith(("vision_", "audio_", "image_", "video_", "processor_"))]:
        del config[key]
    config["quantization_config"]["ignored_layers"] = ["model.layers.0.self_attn.o_proj"]
    return config | {
        "hybrid_layer_pattern": [values["hybrid_layer_pattern"][layer]],
        "moe_layer_freq": [values["moe_layer_freq"][layer]],
        "n_routed_experts": experts,
        "num_experts_per_tok": min(experts, values["num_experts_per_tok"]),
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "vocab_size": LAYER_VOCABULARY,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _fill(path: Path, start: int, name: str, info: TensorInfo, seed: int) -> None:
    """Random values of one tensor, written in place; they depend on name, shape and seed."""
    if info.dtype == "F8_E4M3" or name.endswith("_scale_inv"):
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if info.dtype == "F8_E4M3":
            # without the highest bit of the exponent no code is NaN
            values = torch.empty(info.shape, dtype=torch.uint8).random_(generator=generator).bitwise_and_(0xBF)
        else:
            values = torch.rand(info.shape, generator=generator) * 0.015 + 0.005
    else:
        values = random_tensor(name, info.shape, seed, TORCH_DTYPES[info.dtype])
    with path.open("r+b") as out:
        out.seek(start)
        out.write(values.reshape(-1).view(torch.uint8).numpy())


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_mimo.conversion.sparse_release",
        description="Write the released weight files with true headers and sizes, and holes instead of weights.",
        epilog="example: python -m modeling_mimo.conversion.sparse_release MiMo-V2.5-sparse",
    )
    parser.add_argument("folder", help="folder to write; must not exist or be empty")
    parser.add_argument("--release", default=RELEASE, help=f"whose tensor list the package has (default: {RELEASE})")
    parser.add_argument("--layer", type=int, help="write only this MoE layer, with random values (6.7 GB)")
    parser.add_argument("--experts", type=int, help="with --layer: only so many experts of it")
    parser.add_argument("--seed", type=int, default=0, help="of the random values")
    args = parser.parse_args(arguments)
    try:
        if args.layer is None:
            folder = write_sparse_release(args.folder, args.release)
        else:
            folder = write_layer(args.folder, args.layer, args.release, args.seed, args.experts)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    apparent, on_disk = sum(stat.st_size for stat in stats), sum(stat.st_blocks * 512 for stat in stats)
    print(f"{folder}: {len(stats)} files, {apparent / 1e9:.1f} GB apparent, {on_disk / 1e6:.1f} MB on disk")
    return 0


if __name__ == "__main__":
    sys.exit(main())
