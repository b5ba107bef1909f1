"""`mimo chat`: talk to a checkpoint in the terminal, with images, videos and sounds."""

import argparse
import json
import os
import signal
import sys
from contextlib import contextmanager, suppress
from importlib import import_module

from .loading import add_arguments, load


EXAMPLE = """examples:
  mimo chat /models/MiMo-V2.5
  mimo chat /models/MiMo-V2.5 --image examples/media/chart.png --prompt "Which bar is the highest?"
  mimo chat /models/MiMo-V2.5 --audio examples/media/speech.wav --prompt "When does the meeting start?"
  git diff | mimo chat /models/MiMo-V2.5 --system "Review this change." --json

With --prompt, or with a text on standard input, it answers once and leaves. In the chat, /help lists the commands.
"""

HELP = """\
/image FILE|URL    attach an image to the next message
/video FILE|URL    attach a video, with its sound if it has any
/audio FILE|URL    attach a sound to the next message
/think on|off      let the model think before it answers
/system TEXT       set the system text; without TEXT, the default one
/undo              take back the last message and its answer
/reset             forget the conversation
/explain           what the tokens of the last prompt stand for
/stats             tokens, tokens/s and bytes of the KV cache
/help              this list
/exit              leave; so does Ctrl-D
Ctrl-C stops an answer. A message that opens with \"\"\" ends at the next \"\"\".
A space before / makes a line a message."""

QUOTES = '"""'
DIM, RESET = "\x1b[2m", "\x1b[0m"
# an answer must not steer the terminal
CONTROL_CHARACTERS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a checkpoint in the terminal, with images, videos and sounds",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    parser.add_argument("--system", default="", metavar="TEXT", help="system text (default: that of the template)")
    for kind, article in (("image", "an"), ("video", "a"), ("audio", "an")):
        what = f"attach {article} {kind} file to the first message; repeatable"
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE|URL", help=what)
    parser.add_argument("--max-new-tokens", type=int, help="longest answer (default: the checkpoint's, else 2048)")
    parser.add_argument("--temperature", type=float, help="0: greedy (default: as generation_config.json says)")
    parser.add_argument("--top-p", type=float, help="sample from the most likely tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    parser.add_argument("--no-thinking", dest="thinking", action="store_false", help="answer without thinking")
    parser.add_argument("--json", action="store_true", help="with --prompt: print one JSON object")
    return parser


def run(args) -> int:
    """0. Raises ValueError or OSError for bad input before a model is loaded where that is possible."""
    options = generation_options(args)
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise ValueError("`--prompt`: expected a text, got none.")
    if args.json and prompt is None:
        raise ValueError("`--json`: expected `--prompt` or a text on standard input with it, got neither.")
    media = {"image": args.image, "video": args.video, "audio": args.audio}
    check_sources(media)
    session = load_session(args, options)
    for kind, sources in media.items():
        for source in sources:
            session.attach(kind, source)
    if prompt is not None:
        answer_once(session, prompt.strip(), args.json)
    else:
        Terminal(session).loop()
    return 0


def check_sources(sources: dict[str, list[str]]) -> None:
    """Raises FileNotFoundError for a medium that is not there, before minutes are spent on loading a model."""
    for kind, names in sources.items():
        for name in names:
            if not name.startswith(("http://", "https://")) and not os.path.isfile(os.path.expanduser(name)):
                raise FileNotFoundError(f"`--{kind}`: expected a file or URL, got {name}.")


def generation_options(args) -> dict:
    """Arguments of `generate` that differ from the checkpoint's generation_config."""
    for name, value, fine, expected in (
        ("--max-new-tokens", args.max_new_tokens, lambda value: value >= 1, "at least 1"),
        ("--temperature", args.temperature, lambda value: value >= 0, "0 or more"),
        ("--top-p", args.top_p, lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    ):
        if value is not None and not fine(value):
            raise ValueError(f"`{name}`: expected {expected}, got {value}.")
    if args.temperature == 0:
        return {"do_sample": False}
    given = {"temperature": args.temperature, "top_p": args.top_p}
    given = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def load_session(args, options: dict):
    """A ChatSession. ValueError, OSError: no checkpoint there."""
    model, processor = load(args)

    from transformers import set_seed

    from .chat_session import ChatSession

    set_seed(args.seed)
    return ChatSession(model, processor, args.system, args.thinking, args.max_new_tokens, options)


def answer_once(session, prompt: str, as_json: bool) -> None:
    if as_json:
        message = session.ask(prompt)
        print(json.dumps({**message, "stats": session.stats()}, indent=2, ensure_ascii=False))
        return
    printer = Printer()
    session.ask(prompt, printer.show)
    printer.close()


class Printer:
    """Shows parts of an answer as they come: reasoning dimmed, or between tags where there is no colour."""

    def __init__(self):
        self.is_terminal = sys.stdout.isatty()
        coloured = self.is_terminal and not os.environ.get("NO_COLOR")
        self.before, self.after = (DIM, RESET) if coloured else ("<think>", "</think>")
        self.in_reasoning = False
        self.at_line_start = True

    def show(self, delta: dict) -> None:
        for kind, value in delta.items():
            if (kind == "reasoning_content") != self.in_reasoning:
                self.in_reasoning = not self.in_reasoning
                self.write(self.before if self.in_reasoning else f"{self.after}\n")
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            self.write(text.translate(CONTROL_CHARACTERS) if self.is_terminal else text)

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self.at_line_start = text.endswith("\n")

    def close(self) -> None:
        if self.in_reasoning:
            self.write(self.after)
            self.at_line_start = False
        if not self.at_line_start:
            self.write("\n")


class Terminal:
    """Reads lines, runs commands, shows answers."""

    def __init__(self, session):
        self.session = session

    def loop(self) -> None:
        # gives `input` a history and keys to edit with, where Python has it
        with suppress(ImportError):
            import_module("readline")
        print(f"{self.about()}. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = self.read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self.handle(line)
            except KeyboardInterrupt:
                print("\n[stopped; the message is taken back]")
            except (ValueError, OSError, NotImplementedError) as error:
                sys.stdout.flush()
                print("mimo: error: " + "; ".join(str(error).splitlines()), file=sys.stderr, flush=True)

    def about(self) -> str:
        model = self.session.model
        senses = "text only" if model.visual is None else "text, images and videos"
        if model.audio_encoder is not None:
            senses = "text, images, videos and sound"
        return f"{type(model).__name__}, {model.num_parameters() / 1e6:,.0f}M parameters, {senses}"

    def read(self) -> str:
        line = input(">>> ")
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(input("... "))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        # a quoted text is no command
        return " " + "\n".join(lines).strip()

    def handle(self, line: str) -> None:
        if line.startswith("/"):
            name, _, value = line.partition(" ")
            self.command(name, value.strip())
        elif line.strip():
            self.answer(line.strip())

    def command(self, name: str, value: str) -> None:
        session = self.session
        takes_value = ("/image", "/video", "/audio", "/think")
        plain = {"/undo": session.undo, "/reset": session.reset}
        shown = {"/explain": session.explain, "/stats": self.stats, "/help": lambda: HELP}
        if name not in (*takes_value, "/system", *plain, *shown):
            raise ValueError(f"{name}: expected a command that /help lists.")
        if name != "/system" and bool(value) != (name in takes_value):
            raise ValueError(f"{name}: expected {'a value' if name in takes_value else 'nothing'} after it.")
        if name in ("/image", "/video", "/audio"):
            print(session.attach(name[1:], value))
        elif name == "/think":
            if value not in ("on", "off"):
                raise ValueError(f"/think: expected on or off, got {value}.")
            session.thinking = value == "on"
        elif name == "/system":
            session.system = value
        elif name in plain:
            plain[name]()
        else:
            print(shown[name]())

    def answer(self, text: str) -> None:
        printer = Printer()
        try:
            with stopped_by_ctrl_c(self.session):
                self.session.ask(text, printer.show)
        finally:
            printer.close()
        stopped = self.session.turns[-1].stopped
        if stopped != "end of turn":
            print(f"[{stopped}]")

    def stats(self) -> str:
        stats = self.session.stats()
        held = stats["cache_bytes"]
        lines = [
            f"KV cache: {stats['cached_tokens']:,} tokens, {held['total'] / 2**20:.1f} MiB "
            f"(global {held['full_attention'] / 2**20:.1f}, sliding {held['sliding_attention'] / 2**20:.1f})"
        ]
        if "prompt" in stats:
            new = stats["prompt"] - stats["reused"]
            later = stats["answer"] - 1
            lines = [
                f"prompt: {stats['prompt']:,} tokens, {stats['reused']:,} of them from the cache; {new:,} read in "
                f"{stats['prefill_seconds']:.2f} s ({new / stats['prefill_seconds']:,.0f} tokens/s)",
                f"answer: {stats['answer']:,} tokens"
                + (f", {later / stats['decode_seconds']:.1f} tokens/s" if later else ""),
                *lines,
            ]
        return "\n".join(lines)


@contextmanager
def stopped_by_ctrl_c(session):
    """Ctrl-C lets the model finish its token, so that the cache stays whole; pressed twice, it breaks off."""

    def handle(signum, frame):
        if not session.stop():
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
