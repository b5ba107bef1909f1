"""Turns a finished run into the checkpoint that the package ships: released format, FP8, model card.

    python examples/micro/release.py runs/heads modeling_mimo/data/micro
    mimo bench --micro --count 200 --precision fp8,nf4 --compare runs/bf16 --mtp --json > runs/scores.json
    python examples/micro/release.py runs/heads modeling_mimo/data/micro --scores runs/scores.json

The second call writes the card anew, with the scores.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert


CARD = Path(__file__).with_name("card.md")
# what the run saves beside the weights, and the released format has in its own way
SOURCE_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)
LIMIT = 15_000_000


def write_checkpoint(run: Path, start: Path, folder: Path) -> None:
    """The weights of `run`, with the files that `build.py` wrote beside them: in bfloat16 in "bf16" beside the run, to
    compare with, and from there in FP8 in `folder`."""
    half = run.parent / "bf16"
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "float32"
        whole.mkdir()
        for weights in [*run.glob("*.safetensors"), *run.glob("*.safetensors.index.json")]:
            shutil.copy(weights, whole)
        for name in SOURCE_FILES:
            shutil.copy(start / name, whole)
        shutil.copytree(start / "audio_tokenizer", whole / "audio_tokenizer")
        shutil.rmtree(half, ignore_errors=True)
        # what is not quantized would stay float32
        convert(whole, half, to="hub", dtype="bf16", progress=False)
    # what lies there stays until the new one is whole
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    convert(half, new, to="xiaomi", dtype="fp8", progress=False)
    size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    if size > LIMIT:
        raise ValueError(f"{new}: expected at most {LIMIT:,} bytes, got {size:,}")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"{folder}: {size / 1e6:.1f} MB")


def card(run: Path, scores: dict | None) -> str:
    """The model card of `run`, with a table of held-out scores if there are any."""
    state = json.loads(max(run.parent.glob("trunk/checkpoint-*/trainer_state.json")).read_text(encoding="utf-8"))
    text = CARD.read_text(encoding="utf-8").replace("{trunk_steps}", f"{state['global_step']:,}")
    if scores is None:
        return text.replace("{scores}", "Not measured yet.")
    rows = ["| task | what is asked | right | 95 % interval | chance | bar |", "|---|---|---|---|---|---|"]
    for task in scores["tasks"]:
        score = task["scores"][scores["columns"][0]]
        bar = "" if task["bar"] is None else f"{task['bar']:.0%}"
        rows.append(
            f"| {task['name']} | {task['about']} | {score['accuracy']:.1%} "
            f"| {score['low']:.1%} to {score['high']:.1%} | {task['chance']:.1%} | {bar} |"
        )
    together = [
        f"{name} {score['accuracy']:.1%} right, loss {score['loss']:.4f}" for name, score in scores["all"].items()
    ]
    drafts = [f"{row['text']} {row['mean_accepted_length']:.2f} and {row['times_plain']:.2f}" for row in scores["mtp"]]
    same = "the same tokens as without" if all(row["same_tokens"] for row in scores["mtp"]) else "NOT the same tokens"
    paragraphs = [
        f"{scores['count']} examples per task, {scores['columns'][0]}.",
        "\n".join(rows),
        f"All tasks together: {'; '.join(together)} (nats per token of the expected answers).",
        f"Greedy drafting with three heads in float32, {same}; tokens per step, and times plain speed: "
        f"{'; '.join(drafts)}. Nothing of the package text was trained on.",
    ]
    return text.replace("{scores}", "\n\n".join(paragraphs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that train.py wrote last")
    parser.add_argument("folder", type=Path, help="checkpoint to write; replaced if it is there")
    parser.add_argument("--start", type=Path, help="folder that build.py wrote (default: runs/untrained beside RUN)")
    parser.add_argument("--scores", type=Path, help="JSON of `mimo bench --micro`: only the card is written")
    args = parser.parse_args()
    start = args.start or args.run.parent / "untrained"
    for name, folder in (("run", args.run), ("start", start)):
        if not (folder / "config.json").is_file():
            parser.error(f"{name}: expected a checkpoint, got {folder}")
    if args.scores is None:
        write_checkpoint(args.run, start, args.folder)
    scores = None if args.scores is None else json.loads(args.scores.read_text(encoding="utf-8"))
    (args.folder / "README.md").write_text(card(args.run, scores), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
