"""What `mimo doctor` says about one thing, and what it knows about the releases."""

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple


DATA = resources.files("modeling_mimo") / "data"

# an error stops loading or gives wrong answers, a warning costs quality or speed, a note is for information only
SEVERITIES = ("error", "warning", "note")

# keys that say what architecture a config.json is of
GEOMETRY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_routed_experts")

# keys that may differ from the published file without changing a result: read by nobody, decided by the weights, or
# different in a base model (its context) and in a converted one (quantization)
FREE_KEYS = (
    "_name_or_path",
    "architectures",
    "attention_chunk_size",
    "attention_dropout",
    "attention_projection_layout",
    "auto_map",
    "dtype",
    "fused_qkv_layout",
    "hybrid_block_size",
    "initializer_range",
    "max_position_embeddings",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vision_model_type",
)
MEDIA_KEYS = ("vision_", "image_", "video_", "audio_", "processor_")


class Finding(NamedTuple):
    """`what` is wrong, `why` it matters, and the command or edit that is the `fix`; one line each."""

    severity: str
    what: str
    why: str
    fix: str


class Release(NamedTuple):
    """A published config.json of the same geometry, and the keys whose values are others: {key: (got, there)}."""

    name: str
    differ: dict[str, tuple[Any, Any]]


MISSING = "nothing"


def nearest_release(values: dict[str, Any], text_only: bool) -> Release | None:
    """The release with the fewest other values; None if no release has this geometry.

    text_only: the files have no tower, so that keys of media may be missing.
    """
    candidates = []
    for entry in sorted(DATA.iterdir(), key=lambda entry: entry.name):
        if not (entry / "config.json").is_file():
            continue
        published = json.loads((entry / "config.json").read_bytes())
        if all(values.get(key) == published.get(key) for key in GEOMETRY):
            candidates.append(Release(entry.name, _differences(values, published, text_only)))
    return min(candidates, key=lambda release: len(release.differ), default=None)


def _differences(values: dict[str, Any], published: dict[str, Any], text_only: bool) -> dict[str, tuple[Any, Any]]:
    differ = {}
    for key, there in published.items():
        if key in FREE_KEYS or (text_only and key.startswith(MEDIA_KEYS)):
            continue
        got = values.get(key, MISSING)
        if isinstance(there, dict) and isinstance(got, dict):
            inner = {inside: (got.get(inside, MISSING), value) for inside, value in there.items()}
            differ |= {f"{key}.{inside}": pair for inside, pair in inner.items() if pair[0] != pair[1]}
        elif got != there:
            differ[key] = (got, there)
    return differ


def download(folder: Path, files: str, release: Release | None) -> str:
    """The command that fetches `files` of the published checkpoint into `folder`."""
    name = f"XiaomiMiMo/{release.name}" if release else "REPO_ID"
    return f"hf download {name} {files} --local-dir {shlex.quote(str(folder))}"
