"""The files beside the weights: tokenizer, processor settings, `audio_tokenizer/`, licence, remote code."""

import json
import os
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from modeling_mimo.checkpoint_mimo_v2 import INDEX_NAME

from .checkpoint import Source, refuse_outside


CHAT_TEMPLATE = "chat_template.jinja"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

# folders whose content belongs to one part
_PART_FOLDERS = {"audio_tokenizer": "audio", "dflash": "text"}
_WRITTEN_ANEW = ("config.json", INDEX_NAME)


class Companions(NamedTuple):
    """Files to copy, {name in the target: source}; texts to write, {name: text}; and what is left out, in words."""

    copies: dict[str, Path]
    texts: dict[str, str]
    left_out: list[str]


def find_companions(source: Source, to: str, parts: Collection[str]) -> Companions:
    """What of `source.folder` comes along.

    ValueError: weights that the index does not name, which nobody could convert; a link that leads out of the folder.
    """
    copies: dict[str, Path] = {}
    left_out: list[str] = []
    if source.folder is None:
        return Companions(copies, {}, left_out)
    weights = {*source.fingerprint(), *(info.file.name for info in source.tensors.values())}
    unnamed = []
    for name, path in _walk(source.folder):
        top, is_nested = name.split("/")[0], "/" in name
        part = _PART_FOLDERS.get(top, "text") if is_nested else "text"
        if name in weights or name in _WRITTEN_ANEW:
            continue
        if not is_nested and name.endswith(WEIGHT_SUFFIXES):
            unnamed.append(name)
        elif part not in parts:
            left_out.append(name)
        elif to == "hub" and name == "README.md":
            left_out.append("README.md (replaced by a new model card)")
        elif to == "hub" and not is_nested and name.endswith(".py"):
            left_out.append(f"{name} (remote code, which takes fused rows for plain [Q; K; V])")
        else:
            copies[name] = path
    if unnamed:
        raise ValueError(
            f"{source.folder}: expected every weight file in {INDEX_NAME}, got others: {', '.join(unnamed)}; "
            "move them away, or into a folder of their own, which is copied as it is."
        )
    texts = {}
    if to == "hub" and "text" in parts and _lacks_template(copies):
        template = resources.files("modeling_mimo") / "data" / CHAT_TEMPLATE
        texts[CHAT_TEMPLATE] = template.read_text(encoding="utf-8")
    return Companions(copies, texts, left_out)


def _walk(folder: Path) -> list[tuple[str, Path]]:
    """Every file below `folder` by its relative name, hidden folders (.git, .cache) left out."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *files]:
            refuse_outside(folder, Path(root, name))
        found += [(Path(root, name).relative_to(folder).as_posix(), Path(root, name)) for name in sorted(files)]
    return sorted(found)


def _lacks_template(copies: dict[str, Path]) -> bool:
    """Whether there is a tokenizer, and no chat template in it or beside it."""
    config = copies.get("tokenizer_config.json")
    if (config is None and "tokenizer.json" not in copies) or CHAT_TEMPLATE in copies:
        return False
    try:
        return config is None or not json.loads(config.read_bytes()).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: expected a JSON object, got {error}.") from None


__all__ = ["CHAT_TEMPLATE", "Companions", "find_companions"]
