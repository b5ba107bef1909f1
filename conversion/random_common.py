"""What random checkpoints and random audio tokenizers share: values by name, and folders that are whole or absent."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def random_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values of a released tensor that depend on its name, its shape and the seed alone.

    Linear weights have standard deviation 1 / sqrt(fan in), embeddings and sinks 1, biases 0.1, norms 1 +- 0.1.
    The router keeps float32 whatever `dtype` says.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    values = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return values * 0.05
    if name.endswith("mlp.gate.weight"):
        return values / shape[1] ** 0.5
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
        values = 1 + 0.1 * values
    elif name.endswith(".bias"):
        values = 0.1 * values
    elif len(shape) > 1 and "embed_tokens" not in name:
        values = values / math.prod(shape[1:]) ** 0.5
    return values.to(dtype)


@contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Gives `<folder>.partial` to write to, which becomes `folder` at the end, or goes away after an error.

    ValueError: `folder` exists and is not an empty folder, or `<folder>.partial` exists.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists, expected a new or an empty folder")
    if partial.exists():
        raise ValueError(f"{partial} is left from an interrupted run, expected none; delete it")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
