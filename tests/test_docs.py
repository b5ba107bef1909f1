"""README.md and docs/: every block of code runs, and what the pages name exists."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_pages import read_page
from patience import PATIENCE
from run_page import MAKE, ROOT

from modeling_mimo.cli.main import build_parser
from modeling_mimo.conversion.random_checkpoint import write_random_checkpoint


PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "cli", "conversion", "docs", "examples", "modeling_mimo", "processors", "tests", "training")
LANGUAGES = ("bash", "json", "python", "text", "toml", "xml", "yaml")

RUNNER = Path(__file__).with_name("run_page.py")
# a path in the repository, perhaps with wildcards, that is no part of a longer one
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w*./-]*[\w*]")
NAME = re.compile(r"(?<![\w./-])modeling_mimo(?:\.\w+)+")
IMPORT = re.compile(r"^ *from (modeling_mimo[\w.]*) import ([\w, ]+)$", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

every_page = pytest.mark.parametrize("page", PAGES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("docs") / "checkpoint", "tiny", vision=True, audio=True)


@pytest.fixture
def folder(checkpoint, tmp_path):
    """Where a page runs: the checkpoint of every example, the shipped media, no home."""
    shutil.copytree(checkpoint, tmp_path / "path" / "to" / "MiMo-V2.5")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "home").mkdir()
    return tmp_path


@every_page
def test_every_block_runs(page, folder):
    if not any(block.language in ("python", "bash") for block in read_page(ROOT / page).blocks):
        pytest.skip("no block to run")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUNNER), page]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-6000:]


@every_page
def test_no_block_waits_for_a_time(page):
    """A busy machine would not be done: what is started and waited for runs on, or has ended."""
    waiting = [block for block in read_page(ROOT / page).blocks if "sleep" in block.code]
    assert [block.line for block in waiting if "kill -0" not in block.code] == []


@every_page
def test_every_block_has_a_known_language(page):
    for block in read_page(ROOT / page).blocks:
        assert block.language in LANGUAGES, f"{page}:{block.line}"
        if block.language == "json":
            json.loads(block.code)


@every_page
def test_every_link_leads_somewhere(page):
    links = read_page(ROOT / page).links()
    broken = [f"{page}:{line}: {target}" for line, target in links if not leads_somewhere(ROOT / page, target)]
    assert not broken, "\n".join(broken)


def leads_somewhere(page: Path, target: str) -> bool:
    """Whether a relative link has a file, and its anchor a heading; others are not followed."""
    if re.match(r"[a-z]+:", target):
        return True
    path, _, anchor = target.partition("#")
    place = page.parent / path if path else page
    return place.exists() and (not anchor or anchor in read_page(place).anchors())


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "docs"])
def test_every_page_that_the_code_names_exists(folder):
    broken = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"docs/[\w-]+\.md(?:#[\w-]+)?", path.read_text(encoding="utf-8"))
        if not leads_somewhere(ROOT / "setup.cfg", name)
    ]
    assert not broken, "\n".join(broken)


@every_page
def test_every_file_that_a_page_names_exists(page):
    paths = set(PATH.findall((ROOT / page).read_text(encoding="utf-8")))
    missing = sorted(path for path in paths if not any(ROOT.glob(path)))
    assert not missing, ", ".join(missing)


@every_page
def test_every_name_of_the_package_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(NAME.findall(text))
    for module, imported in IMPORT.findall(text):
        names |= {f"{module}.{name.split()[0]}" for name in imported.split(",") if name.strip()}
    missing = sorted(name for name in names if not exists(name))
    assert not missing, ", ".join(missing)


def exists(name: str) -> bool:
    """Whether a dotted name is a module or what one has."""
    head, _, tail = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return bool(head) and exists(head) and hasattr(member(head), tail)
    return True


def member(name: str):
    head, _, tail = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(member(head), tail)


@every_page
def test_every_command_and_flag_exists(page):
    """`mimo` commands in blocks and between backticks; a flag by itself is one of some program of the repository."""
    (action,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    known = {name: set(parser._option_string_actions) for name, parser in action.choices.items()}
    sources = [path.read_text(encoding="utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    own = {flag for text in sources for flag in re.findall(r"[\"'](--[a-z][\w-]*)[\"']", text)}
    parsed, unknown = read_page(ROOT / page), []
    code = [(block.line, block.code) for block in parsed.blocks if block.language in ("bash", "text")]
    for line, text in code + parsed.inline_code():
        for name, flags in mimo_commands(text):
            if name not in known or not flags <= known[name]:
                unknown.append(f"{page}:{line}: mimo {name} {' '.join(sorted(flags))}")
        if text.startswith("--") and not set(FLAG.findall(text)) <= own:
            unknown.append(f"{page}:{line}: {text}")
    assert not unknown, "\n".join(unknown)


def mimo_commands(text: str) -> list[tuple[str, set[str]]]:
    """(subcommand, its flags) of every `mimo` command in a shell text."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            # a quotation of several lines
            words = line.split()
        for command in " ".join(words).replace("&&", ";").replace("|", ";").split(";"):
            program, *rest = command.split() or [""]
            if program == "mimo" and rest and not rest[0].startswith("-"):
                found.append((rest[0], set(FLAG.findall(" ".join(rest)))))
    return found


@every_page
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    parsed = read_page(ROOT / page)
    texts = [block.code for block in parsed.blocks if MAKE.fullmatch(block.code)]
    texts += [f"{code}\n" for _, code in parsed.inline_code() if MAKE.fullmatch(f"{code}\n")]
    assert {target for text in texts for target in re.findall(r"^make (\w+)", text, re.MULTILINE)} <= targets
