"""docs/gallery.md says what its data says, and its data is of the model that is shipped."""

import json
import subprocess
import sys

import pytest
from run_page import ROOT


# names of scripts in benchmarks/ must not become modules of this process
SCRIPT = """
import json
import gallery
options = gallery.parse([])
print(json.dumps({"page": gallery.page(options), "weights": gallery.fingerprint(options.model)}))
"""


@pytest.fixture(scope="module")
def rendered():
    """`page`: the text that gallery.py would write now; `weights`: fingerprint of the shipped checkpoint."""
    command = [sys.executable, "-c", SCRIPT]
    return json.loads(subprocess.run(command, cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, check=True).stdout)


def test_the_page_is_what_the_data_renders_to(rendered):
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == rendered["page"]


def test_what_depends_on_weights_was_measured_with_the_shipped_ones(rendered):
    files = sorted((ROOT / "docs" / "images" / "gallery").glob("*.json"))
    measured = {path.stem: json.loads(path.read_text(encoding="utf-8"))["weights"] for path in files}
    others = {name: weights for name, weights in measured.items() if weights not in (None, rendered["weights"])}
    assert measured
    assert not others, f"measure these again: {others}, shipped is {rendered['weights']}"
