"""The screen of `mimo demo`: lines of at most 110 columns for what was measured."""

import json
import sys
from typing import Any

from .chat import CONTROL_CHARACTERS


WIDTH = 110
INDENT = 11


def say(text: str) -> None:
    # an answer must not steer the terminal
    print(text.translate(CONTROL_CHARACTERS) if sys.stdout.isatty() else text, flush=True)


def quiet(text: str) -> None:
    """For `--json`, which prints one object at the end."""


def header(model: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parts_of(model).items())
    on_disk = f"; {mega(model['folder_bytes'])} on disk with codec and tokenizer" if model["folder_bytes"] else ""
    return "\n".join(
        [
            f"{model['name']}: {model['parameters'] / 1e6:,.1f}M parameters ({parts})",
            f"{mega(model['tensor_bytes'])} of {model['stored_as']}{on_disk}; loaded as {model['dtype']} on "
            f"{model['device']} in {model['load_seconds']:.1f} s",
            *model["layers"],
            "",
        ]
    )


def parts_of(model: dict[str, Any]) -> dict[str, int]:
    """Parameters of what has a sense of its own, and of the rest, which is the language model."""
    named = {name: model["parts"][name] for name in ("vision", "audio", "mtp") if name in model["parts"]}
    return {"text": sum(model["parts"].values()) - sum(named.values()), **named}


def row(measured: dict[str, Any]) -> str:
    """What is asked about what, the answer, and where that is wrong what was expected; at the right what it cost."""
    media = " + ".join(f"{count} {kind}" for kind, count in measured["media_tokens"].items())
    file = f"{measured['file']}: " if measured["file"] else ""
    cost = f"{measured['prompt_tokens']:,} tokens" + (f" ({media})" if media else "")
    verdict = {None: "", True: "right  ", False: "WRONG  "}[measured["right"]]
    spent = f"{verdict}{measured['answer_tokens']} tokens, {measured['seconds']:.2f} s"
    lines = [
        line(measured["label"], file + measured["question"], cost),
        line("", f"> {answer_of(measured)}", spent),
    ]
    if measured["right"] is False:
        lines.append(line("", f"  expected: {measured['expected']}", ""))
    return "\n".join(lines)


def answer_of(row: dict[str, Any]) -> str:
    thought = f"({row['reasoning'].strip()}) " if row["reasoning"].strip() else ""
    calls = "".join(f"{call['name']}({arguments_of(call)})" for call in row["tool_calls"])
    return f"{thought}{row['answer'].strip()}{calls}"


def arguments_of(call: dict[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items())


def line(label: str, left: str, right: str) -> str:
    """`left` is cut to fit between the label and `right`, which ends at the last column."""
    room = WIDTH - INDENT - len(right) - 2
    left = shortened(" ".join(left.split()), room)
    return headed(label, f"{left:<{room}}  {right}").rstrip()


def shortened(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(0, room - 4)]} ..."


def drafting(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "\n" + headed("drafting", "this checkpoint has no MTP heads")
    plain, mtp = measured["plain_tokens_per_second"], measured["mtp_tokens_per_second"]
    shares = [f"{done / max(1, asked):.0%}" for done, asked in zip(measured["accepted"], measured["proposed"])]
    speed = (
        f"{measured['texts']} stories, {measured['tokens']} tokens: {plain:,.0f} tokens/s one by one, {mtp:,.0f} "
        f"tokens/s with {len(shares)} MTP heads, {mtp / plain:.2f} times"
    )
    same = "yes" if measured["same_tokens"] else "NO, try --dtype float32"
    accepted = (
        f"accepted length {measured['mean_accepted_length']:.2f} of {len(shares) + 1} (drafts taken: "
        f"{' '.join(shares)}); same tokens: {same}"
    )
    return "\n" + headed("drafting", speed) + "\n" + headed("", accepted)


def footer(result: dict[str, Any]) -> str:
    cache = result["cache"]
    held, full = cache["bytes"], cache["bytes_all_global"]
    kept = (
        f"{cache['tokens']:,} tokens: {kibi(held['total'])} allocated (global layers {kibi(held['full_attention'])}); "
        f"all layers global: {kibi(full)}, {full / held['total']:.1f} times"
    )
    summary = f"{right_of(result['questions'])}; {result['seconds']:.1f} s with loading, without Python's imports"
    return headed("KV cache", kept) + "\n" + headed("together", summary)


def headed(label: str, text: str) -> str:
    return f"{label:<{INDENT}}{text}"


def right_of(rows: list[dict[str, Any]]) -> str:
    known = [row["right"] for row in rows if row["right"] is not None]
    return f"{len(rows)} questions, {sum(known)} of {len(known)} shipped ones right"


def mega(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def kibi(count: int) -> str:
    return f"{count / 2**10:,.0f} KiB"
