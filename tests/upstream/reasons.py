"""Skips with reasons, for tests of a mixin that do not apply."""

import unittest
from collections.abc import Callable
from fnmatch import fnmatchcase


def skip_tests(reasons: dict[str, tuple[str, ...]]) -> Callable[[type], type]:
    """A class decorator: `reasons` maps a reason to the tests that it skips, names without "test_", perhaps with `*`.

    Raises:
        ValueError: a name that no test of the class has, e.g. after an update of Transformers.
    """

    def decorate(kind: type) -> type:
        # parametrized tests leave None under the name without a number
        tests = [name for name in dir(kind) if name.startswith("test_") and callable(getattr(kind, name))]
        for reason, patterns in reasons.items():
            for pattern in patterns:
                names = [name for name in tests if fnmatchcase(name, f"test_{pattern}")]
                if not names:
                    raise ValueError(f"{kind.__name__}: expected a test_{pattern}, got none.")
                for name in names:
                    setattr(kind, name, unittest.skip(reason)(lambda self: None))
        return kind

    return decorate
