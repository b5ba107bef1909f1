"""Markdown as far as README.md and docs/ use it: fenced blocks, the text between them, links and headings."""

import re
from pathlib import Path
from typing import NamedTuple


FENCE = re.compile(r"( *)(```+)(.*)")
HEADING = re.compile(r"#{1,6} +(.*?)\s*#*")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"(`+)(.+?)\1")


class Block(NamedTuple):
    """A fenced block. `line`: of its first line of code, from 1; `follows`: only blank lines lie before its fence."""

    language: str
    code: str
    line: int
    follows: bool


class Page(NamedTuple):
    """Fenced blocks in order, and all other lines as pairs (line number from 1, text)."""

    blocks: list[Block]
    lines: list[tuple[int, str]]

    def links(self) -> list[tuple[int, str]]:
        """(line, target) of every link and image outside code."""
        plain = ((line, INLINE_CODE.sub("", text)) for line, text in self.lines)
        return [(line, target) for line, text in plain for target in LINK.findall(text)]

    def inline_code(self) -> list[tuple[int, str]]:
        """(line, code) of what stands between backticks."""
        return [(line, match.group(2)) for line, text in self.lines for match in INLINE_CODE.finditer(text)]

    def anchors(self) -> set[str]:
        """The anchors that GitHub gives to the headings."""
        found: dict[str, int] = {}
        for _, text in self.lines:
            if heading := HEADING.fullmatch(text):
                words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.group(1))
                slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
                found[slug] = found.get(slug, -1) + 1
        return {f"{slug}-{number}" if number else slug for slug, most in found.items() for number in range(most + 1)}


def read_page(path: str | Path) -> Page:
    """ValueError: a block that does not end."""
    blocks, lines, fence, code, follows = [], [], None, [], False
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.fullmatch(text)
        if fence is None and match:
            fence, code = match, []
        elif fence is None:
            lines.append((number, text))
            follows = follows and not text.strip()
        elif match and match.group(2) == fence.group(2) and not match.group(3).strip():
            indent = len(fence.group(1))
            source = "".join(f"{row[indent:]}\n" for row in code)
            blocks.append(Block(fence.group(3).strip(), source, number - len(code), follows))
            fence, follows = None, True
        else:
            code.append(text)
    if fence is not None:
        raise ValueError(f"{path}: expected an end of the last block, got none")
    return Page(blocks, lines)
