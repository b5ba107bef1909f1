"""The one deadline of the tests: it ends a test that hangs, and nothing that is asserted depends on it.

A busy machine may take ten times as long as a quiet one. What is claimed of time is tested as work: bytes that are
read, files that are opened, functions that are called; speed itself is measured in benchmarks/.
"""

import sys
import time
from collections.abc import Callable
from typing import Any


# seconds; what is waited for takes at most a minute on a quiet machine
PATIENCE = 600


def settled(predicate: Callable[[], object]) -> bool:
    """Waits until it comes true; False if that never happens."""
    end = time.monotonic() + PATIENCE
    while not predicate():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def counted_calls(function: Callable[[], Any]) -> tuple[Any, int]:
    """What `function` returns, and how many Python functions were called for it in this thread."""
    count, before = 0, sys.getprofile()

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        return function(), count
    finally:
        sys.setprofile(before)
