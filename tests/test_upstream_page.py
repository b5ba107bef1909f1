"""docs/upstream-tests.md: of the installed Transformers and of the classes in tests/upstream, a reason per skip."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "upstream-tests.md").read_text(encoding="utf-8")


def adapters():
    """Names of the test classes of the adapters, which cannot be imported without the downloaded mixins."""
    trees = [ast.parse((ROOT / "tests/upstream" / name).read_text("utf-8")) for name in ("models.py", "processors.py")]
    return {
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "unittest.TestCase" for base in node.bases)
    }


def counts():
    """class -> passed, skipped, failed."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    return {name: tuple(map(int, numbers)) for name, *numbers in rows}


def test_the_page_is_of_the_newest_supported_line():
    (newest,) = re.findall(
        r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert f"transformers {newest}," in PAGE


def test_every_class_has_run_and_nothing_failed():
    assert counts().keys() == adapters()
    assert len(adapters()) > 4
    for passed, _, failed in counts().values():
        assert passed > 0
        assert failed == 0


def test_every_skip_has_a_reason():
    section = PAGE.partition("## Skipped")[2].partition("## Failed")[0]
    listed = 0
    for reason, tests in re.findall(r"^\| (.*) \| (.*) \|$", section, re.MULTILINE)[1:]:
        assert len(reason) > 10
        for part in tests.split("; "):
            kinds, _, names = part.partition(": ")
            listed += len(kinds.split(", ")) * len(names.split(", "))
    assert listed == sum(skipped for _, skipped, _ in counts().values())
