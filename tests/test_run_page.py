"""The tests of the pages themselves: what is wrong on a page is found, and named by its line."""

import subprocess
import sys

import pytest
import test_docs
from markdown_pages import read_page
from patience import PATIENCE
from run_page import ROOT


FINE = """\
# A page

```python
number = 2
```

```bash
echo written > file.txt
```

```make
no language that runs
```

```python
print(number, open("file.txt").read(), 0.123)
```

```text
2 written
 ...
```

```text
not behind a block that runs
```

```bash
make test  # not run
```
"""


def run(folder, text):
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests" / "run_page.py"), str(page)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stderr.replace(str(page), "page.md")


def test_blocks_run_in_order_and_share_names_and_folder(tmp_path):
    assert run(tmp_path, FINE) == (0, "")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("```python\none = 1\n\none / 0\n```\n", "page.md:6: ZeroDivisionError"),
        ("```python\none = = 1\n```\n", "page.md:4: SyntaxError"),
        ("```bash\nfalse\ntrue\n```\n", "page.md:4: CalledProcessError"),
        ("```bash\nfalse | cat\n```\n", "page.md:4: CalledProcessError"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "page.md:8: AssertionError"),
        ("```bash\necho 1\n```\n\n```text\n1\n...\n2\n```\n", "page.md:8: AssertionError"),
    ],
)
def test_a_failing_block_is_named_by_its_line(tmp_path, code, found):
    status, errors = run(tmp_path, f"# A page\n\n{code}")
    assert status == 1
    assert found in errors


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (test_docs.test_every_block_has_a_known_language, "```cobol\n```"),
        (test_docs.test_every_block_has_a_known_language, "```\n```"),
        (test_docs.test_every_block_has_a_known_language, "```json\n{,}\n```"),
        (test_docs.test_every_link_leads_somewhere, "[a](missing.md)"),
        (test_docs.test_every_link_leads_somewhere, "[a](#no-heading)"),
        (test_docs.test_every_file_that_a_page_names_exists, "see `tests/missing_file.py`"),
        (test_docs.test_every_file_that_a_page_names_exists, "see `tests/missing_*.py`"),
        (test_docs.test_every_name_of_the_package_exists, "`modeling_mimo.processors.Missing`"),
        (
            test_docs.test_every_name_of_the_package_exists,
            "```text\nfrom modeling_mimo import HybridCache, Missing\n```",
        ),
        (test_docs.test_every_command_and_flag_exists, "`mimo dance`"),
        (test_docs.test_every_command_and_flag_exists, "`mimo plan PATH --missing-flag 3`"),
        (test_docs.test_every_command_and_flag_exists, "```text\nls | mimo chat A \\\n  --missing-flag\n```"),
        (test_docs.test_every_command_and_flag_exists, "`--missing-flag`"),
        (test_docs.test_every_make_target_exists, "```bash\nmake missing\n```"),
    ],
)
def test_the_checks_find_what_is_wrong(tmp_path, check, wrong):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[it](#a-page) has `mimo plan PATH --json`, `--json`, `make test`\n", encoding="utf-8")
    check(str(page))
    page.write_text(f"# A page\n\n{wrong}\n", encoding="utf-8")
    with pytest.raises((AssertionError, ValueError)):
        check(str(page))


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# The window: 128 or 129\n\n## `qkv_proj`, [again](page.md)\n\n## Twice\n\n## Twice\n", encoding="utf-8"
    )
    assert read_page(page).anchors() == {"the-window-128-or-129", "qkv_proj-again", "twice", "twice-1"}
