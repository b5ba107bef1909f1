"""Makes modeling_mimo/data/media again, what `mimo demo` shows: `python examples/micro/make_media.py [FOLDER]`.

Held-out examples of MiMo-Micro's tasks as files: a picture, a clip, a sound and a clip with sound, and media.json with
what is asked about them and what they show, beside questions without media and the stories that drafting is timed on.
Each is the first one of its task; none was chosen by what the model answers. The fact alone is also trained on.
"""

import json
import sys
from pathlib import Path

import soundfile
from PIL import Image

from modeling_mimo.training.micro_sounds import RATE
from modeling_mimo.training.micro_tasks import example


FOLDER = Path(__file__).parents[2] / "modeling_mimo" / "data" / "media"
# what the screen calls it, task, number among the task's held-out examples, name of the file
QUESTIONS = (
    ("picture", "describe_two", 0, "picture.png"),
    ("clip", "clip", 0, "clip.mp4"),
    ("sound", "order", 0, "sound.wav"),
    ("clip+sound", "match", 0, "clip_with_sound.mp4"),
    ("far key", "key", 0, None),
    ("thinking", "sum", 0, None),
    ("tool", "tool", 0, None),
    ("by heart", "fact", 0, None),
)
STORIES = 3


def write_media(part: dict, path: Path) -> None:
    """The medium of a message's part as a file."""
    if part["type"] == "image":
        Image.fromarray(part["image"]).save(path, optimize=True)
    elif part["type"] == "audio":
        soundfile.write(path, part["audio"], RATE, subtype="PCM_16")
    else:
        path.write_bytes(part["video"])


def entry(folder: Path, label: str, task: str, number: int, file: str | None) -> dict:
    """What media.json says of an example; its medium becomes a file."""
    drawn = example(task, number)
    message = drawn["messages"][0]
    text = message["content"]
    if file is not None:
        part, words = message["content"]
        text = words["text"]
        write_media(part, folder / file)
        message["content"] = [{"type": part["type"], "file": file}, words]
    # behind a long text
    question = f"{text[text.rindex('.') + 2 :]}" if text.endswith("?") and "." in text else text
    return {"label": label, "task": task, "number": number, "file": file, "question": question, **drawn}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    listed = {
        "questions": [entry(folder, *row) for row in QUESTIONS],
        "drafting": [entry(folder, "story", "story", number, None) for number in range(STORIES)],
    }
    (folder / "media.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
