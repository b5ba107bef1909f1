"""What the plots of the gallery share: MiMo-Micro, its forms and its held-out examples, and text to read."""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig

from modeling_mimo import MiMoV2FP8Config
from modeling_mimo.cli.bench_micro import numbered
from modeling_mimo.training import ConversationCollator
from modeling_mimo.training.micro_tasks import TASKS, example


ROOT = Path(__file__).resolve().parent.parent
MODALITIES = ("text", "image", "video", "audio")


def load(path: str, dtype: torch.dtype = torch.bfloat16, form: str | None = None, **options):
    """A checkpoint for inference. form: "FP8" as stored in memory, "nf4", or None for floats of `dtype`."""
    if form == "FP8":
        options["quantization_config"] = MiMoV2FP8Config(dequantize=False)
    elif form == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def page_ids(tokenizer, length: int) -> torch.Tensor:
    """[1, length] ids of the repository's documentation; repeated where too short."""
    # a run should not read what the last one wrote
    pages = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "gallery.md")
    ids = tokenizer("\n".join(page.read_text(encoding="utf-8") for page in pages)).input_ids
    return torch.tensor([(ids * -(-length // len(ids)))[:length]])


def answered(path: str, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of `count` held-out examples of each task of MiMo-Micro, with the expected answer behind them.

    They are the first ones that `mimo bench --micro` asks.
    """
    collator = ConversationCollator(AutoProcessor.from_pretrained(path))
    for task in TASKS:
        for number in range(count):
            asked = example(task, numbered(0, number))
            batch = collator([{**asked, "messages": [*asked["messages"], asked["reply"]]}])
            yield {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}


def places(model, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Modality -> which of the tokens [1, S] are its placeholders, [S] bool; the others are text."""
    found = {kind: model.placeholders(input_ids, kind)[0] for kind in MODALITIES[1:]}
    return {"text": ~torch.stack(list(found.values())).any(0), **found}
