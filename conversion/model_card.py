"""The README.md of a converted checkpoint: metadata of the Hub, usage, provenance, what was changed and measured."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from modeling_mimo.configuration_mimo_v2 import MiMoV2Config

from .checkpoint import parse_config


# what stands for the repository until it has a name, and for the table until somebody verified the checkpoint
PATH = "path/to/this/checkpoint"
UNVERIFIED = "Not verified yet: `mimo verify` checks every tensor, or compares them with those of the source."

OWNER = "XiaomiMiMo"
RELEASES = (
    "MiMo-V2-Flash",
    "MiMo-V2-Flash-Base",
    "MiMo-V2.5",
    "MiMo-V2.5-Base",
    "MiMo-V2.5-DFlash",
    "MiMo-V2.5-Pro",
    "MiMo-V2.5-Pro-Base",
    "MiMo-V2.6-Flash-MOPD",
    "MiMo-V2.6-Flash-RL",
    "MiMo-V2.6-Pro-MOPD",
    "MiMo-V2.6-Pro-RL",
)

_MEDIA_USAGE = """\
import modeling_mimo  # registers model and processor with Transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

path = "{path}"
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(path)
content = [
{media}    {{"type": "text", "text": "What is this about?"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64{drafting})
print(processor.parse_response(output[0, inputs["input_ids"].shape[1] :]))
"""

_TEXT_USAGE = """\
import modeling_mimo  # registers the model with Transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{path}"
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "What is the capital of France?"}}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64{drafting})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def model_card(
    config: dict[str, Any],
    report: dict[str, Any] | None = None,
    verification: dict[str, Any] | None = None,
    repo_id: str | None = None,
) -> str:
    """The text of a README.md that `huggingface_hub.ModelCard` reads.

    Args:
        config: the contents of config.json.
        report: `ConversionReport.to_dict()`; without it the card says nothing about where the files come from.
        verification: `VerifyReport.to_dict()`.
        repo_id: repository that the usage names; None leaves PATH for `complete_card`.

    ValueError: a config of another architecture.
    """
    parsed = parse_config(config)
    source = None if report is None else source_name(report)
    base = f"{OWNER}/{source.split('/')[-1]}" if source and source.split("/")[-1] in RELEASES else None
    data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag=pipeline_tag(parsed),
        base_model=base,
        tags=["mimo_v2", "moe", "conversational", weight_dtype(config)],
    )
    sections = [
        f"# {repo_id.split('/')[-1] if repo_id else source or 'MiMo-V2'}",
        _description(parsed, config, base or source),
        "## Use\n\nWith the package `modeling-mimo` installed:",
        f"```python\n{usage(parsed, PATH)}```",
        "Where the repository holds code files of this package (`quantization_mimo_v2.py` is one), it loads without "
        "the package too: leave out its import and give `trust_remote_code=True` to each `from_pretrained`.",
        *([] if report is None else _provenance(report, source)),
        f"## Verification\n\n{UNVERIFIED}",
        "## Licence\n\nMIT, as the original weights by Xiaomi. The code is the package `modeling-mimo`, also MIT.",
    ]
    card = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    return complete_card(card, repo_id, verification)


def complete_card(card: str, repo_id: str | None, verification: dict[str, Any] | None) -> str:
    """`card` with what was not known when it was written; any other card stays as it is."""
    if repo_id is not None:
        card = card.replace(PATH, repo_id)
    return card if verification is None else card.replace(UNVERIFIED, _verification(verification))


def pipeline_tag(config: MiMoV2Config) -> str:
    """The Hub's name for what goes in and out; the package registers the Auto class of each of these pipelines."""
    if config.audio_config is not None:
        return "any-to-any"
    return "text-generation" if config.vision_config is None else "image-text-to-text"


def weight_dtype(config: dict[str, Any]) -> str:
    """Of most weights: "fp8", "mxfp4", "bfloat16", ..."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        return quantization.get("store_dtype", "fp8")
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def source_name(report: dict[str, Any]) -> str:
    """Repository or name of a folder: where that folder lies on somebody's machine is no part of a card."""
    source = str(report["source"])
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", source)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    # a relative path looks like a repository, but has no commit
    return source if report["revision"] and re.fullmatch(r"[\w.-]+/[\w.-]+", source) else Path(source).name


def usage(config: MiMoV2Config, path: str) -> str:
    """Lines of Python that load the checkpoint and let it answer."""
    drafting = ", use_mtp=True" if config.num_mtp_layers else ""
    media = ""
    if config.vision_config is not None:
        media += '    {"type": "image", "path": "picture.png"},\n'
    if config.audio_config is not None:
        media += '    {"type": "audio", "path": "sound.wav"},\n'
    return (_MEDIA_USAGE if media else _TEXT_USAGE).format(path=path, media=media, drafting=drafting)


def _description(parsed: MiMoV2Config, config: dict[str, Any], source: str | None) -> str:
    inputs = ["text"]
    inputs += ["images", "video"] if parsed.vision_config is not None else []
    inputs += ["sound"] if parsed.audio_config is not None else []
    heads = parsed.num_mtp_layers
    return (
        f"{source or 'A MiMo-V2 checkpoint'} in the layout of Hugging Face Transformers. Reads {', '.join(inputs)}; "
        f"writes text. {parsed.num_hidden_layers} layers, {parsed.n_routed_experts} experts of which "
        f"{parsed.num_experts_per_tok} are used per token, {heads or 'no'} MTP heads for drafting, "
        f"up to {parsed.max_position_embeddings:,} tokens. Weights: {weight_dtype(config)}."
    )


def _provenance(report: dict[str, Any], source: str) -> list[str]:
    """Sections on where the files come from, and how they differ from there."""
    revision = f" at revision `{report['revision']}`" if report["revision"] else ""
    command = f"mimo convert --to {report['to']} --dtype {report['dtype']}"
    rows = [
        (f"`{file['name']}`", f"{file['bytes']:,}", f"`{file['sha256']}`" if file["sha256"] else "")
        for file in report["files"]
        if "tensors" in file
    ]
    sections = [
        f"## Provenance\n\nMade of `{source}`{revision} by `{command}`: {report['tensors']:,} tensors, "
        f"{report['total_size']:,} bytes, attention projections {report['layout']}.",
        _table(("file", "bytes", "sha256"), rows),
        "## What was changed",
        "\n".join(f"- {line}" for line in report["changes"]) or "Nothing: every tensor has the bytes of the source.",
    ]
    if not report["errors"]:
        return [*sections, "No weight was requantized."]
    errors = [
        (group, f"{error['tensors']:,}", f"{error['max_relative']:.2e}", f"{error['mean_relative']:.2e}")
        for group, error in report["errors"].items()
    ]
    title = (
        "Requantized weights, with their measured error: the largest relative to the largest value of its tensor, the "
        "mean relative to the mean value."
    )
    return [*sections, title, _table(("group", "tensors", "largest error", "mean error"), errors)]


def _verification(result: dict[str, Any]) -> str:
    """What `mimo verify` found, as tables."""
    rows = [
        ("tensors", f"{result['tensors']:,} in {result['files']} files, {result['bytes']:,} bytes"),
        ("parameters", f"{result['parameters']:,}"),
        ("attention projections", result["layout"]),
        ("names, shapes and dtypes", "compared with config.json"),
        ("values", "not read" if result["headers_only"] else "read and checked"),
    ]
    if result["audio_tokenizer"] is not None:
        rows.append(("`audio_tokenizer/`", f"{result['audio_tokenizer']} tensors"))
    rows += [(f"FP8 scales, {part}", f"{low:.3g} to {high:.3g}") for part, (low, high) in result["scales"].items()]
    rows.append(("problems", "; ".join(result["problems"]) or "none"))
    text = _table(("check", "result"), rows)
    if result["comparison"] is None:
        return text
    groups = [
        (group, *(f"{sums[kind]:,}" for kind in ("equal", "dequantized", "different")), _error(sums["errors"]))
        for group, sums in result["comparison"]["groups"].items()
    ]
    header = ("compared with the source", "equal bytes", "equal values", "different", "rms error")
    return f"{text}\n\n{_table(header, groups)}"


def _error(errors: dict[str, Any]) -> str:
    return "not finite" if errors["rms_relative"] is None else f"{errors['rms_relative']:.2e}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


__all__ = ["complete_card", "model_card", "pipeline_tag", "source_name", "usage", "weight_dtype"]
