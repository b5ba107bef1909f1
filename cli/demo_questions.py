"""What `mimo demo` asks: about the media that the package ships, and about the user's files."""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from .chat_session import read_bytes
from .demo import decoded


# about a user's file, in the words that MiMo-Micro was taught; a text asks for itself
KINDS = {
    "image": ("picture", "Describe the picture."),
    "video": ("clip", "What happens?"),
    "audio": ("sound", "What is heard?"),
    "text": ("text", ""),
}


@dataclass
class Question:
    """A conversation to answer.

    label, file, question: for people: "picture", the name of the file if there is one, the words alone.
    options: further arguments of `apply_chat_template`, beside `tools`.
    example: what `micro_tasks.is_right` takes; None where no answer is known.
    """

    label: str
    file: str | None
    question: str
    messages: list[dict]
    options: dict[str, Any] = field(default_factory=dict)
    tools: list[dict] | None = None
    example: dict[str, Any] | None = None


def shipped() -> tuple[list[Question], list[Question]]:
    """The questions about what the package ships, and those that drafting is measured with."""
    folder = files("modeling_mimo") / "data" / "media"
    listed = json.loads((folder / "media.json").read_text(encoding="utf-8"))
    return tuple([_shipped(entry, folder) for entry in listed[part]] for part in ("questions", "drafting"))


def _shipped(entry: dict, folder) -> Question:
    (message,) = entry["messages"]
    content = message["content"]
    if entry["file"] is not None:
        medium, *words = content
        content = [{"type": medium["type"], "path": str(folder / entry["file"])}, *words]
    messages = [{"role": message["role"], "content": content}]
    options = {"enable_thinking": True} | entry.get("chat_template_kwargs", {})
    return Question(entry["label"], entry["file"], entry["question"], messages, options, entry.get("tools"), entry)


def own(args) -> list[Question]:
    """A question about each file of the user. ValueError, OSError: a text that cannot be read."""
    return [own_question(kind, source, args.ask) for kind in KINDS for source in vars(args)[kind]]


def own_question(kind: str, source: str, asked: str | None) -> Question:
    label, default = KINDS[kind]
    question = asked or default
    if kind == "text":
        content = f"{read(source).strip()} {question}".strip()
    else:
        content = [{"type": kind, **located(source)}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    name = source.rstrip("/").rpartition("/")[2]
    return Question(label, name, question or content, messages, {"enable_thinking": False})


def located(source: str) -> dict[str, str]:
    """A part's `url` or `path`."""
    is_url = source.startswith(("http://", "https://"))
    return {"url": source} if is_url else {"path": str(Path(source).expanduser())}


def read(source: str) -> str:
    """The text of a file or URL."""
    return decoded(read_bytes("text", source), source)
