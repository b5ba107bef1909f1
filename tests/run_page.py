"""Runs the blocks of one page in order, in this process and the current folder.

    python tests/run_page.py docs/media.md

Python blocks share one namespace; bash blocks run in the same folder. A ```text block right behind one of them is what
it prints, where `...` stands for anything. A bash block of `make` commands is left out: `make test` runs this.
"""

import contextlib
import doctest
import io
import linecache
import re
import subprocess
import sys
import traceback
from pathlib import Path

from markdown_pages import Block, read_page


ROOT = Path(__file__).resolve().parent.parent
MAKE = re.compile(r"(make \w+ *(#.*)?\n)+")


def run_python(block: Block, page: str, namespace: dict) -> str:
    """What it prints. Tracebacks of its errors name lines of the page."""
    code = compile("\n" * (block.line - 1) + block.code, page, "exec")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, namespace)
    return output.getvalue()


def run_bash(block: Block) -> str:
    """What it prints. CalledProcessError: a command failed."""
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def check_output(expected: str, got: str) -> None:
    """AssertionError unless they agree, but for blanks at the ends of lines."""
    want, got = ("".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines()) for text in (expected, got))
    if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
        raise AssertionError(f"expected the output\n{want}\ngot\n{got}")


def run_page(page: str) -> None:
    """Exit status 1, and a last line `page:line: error`, if a block fails."""
    text = (ROOT / page).read_text(encoding="utf-8")
    linecache.cache[page] = (len(text), None, text.splitlines(keepends=True), page)
    namespace = {"__name__": "__main__"}
    # of the block before, if it ran
    output = None
    for block in read_page(ROOT / page).blocks:
        try:
            if block.language == "text" and block.follows and output is not None:
                check_output(block.code, output)
            output = None
            if block.language == "python":
                output = run_python(block, page, namespace)
            elif block.language == "bash" and not MAKE.fullmatch(block.code):
                output = run_bash(block)
        except Exception as error:
            traceback.print_exc()
            rows = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == page]
            print(f"{page}:{rows[0] if rows else block.line}: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    run_page(sys.argv[1])
