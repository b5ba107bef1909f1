"""Skips with reasons, for tests of a mixin that do not apply."""

import unittest
from collections.abc import Callable


def skip_tests(reasons: dict[str, tuple[str, ...]], but: tuple[str, ...] = ()) -> Callable[[type], type]:
    """A class decorator: `reasons` maps a reason to the beginnings of the names, without "test_", that it skips.

    Raises:
        ValueError: a beginning that no test of the class has, e.g. after an update of Transformers.
    """

    def decorate(kind: type) -> type:
        for reason, beginnings in reasons.items():
            for beginning in beginnings:
                names = [name for name in dir(kind) if name.startswith(f"test_{beginning}")]
                if not names:
                    raise ValueError(f"{kind.__name__}: expected a test test_{beginning}..., got none.")
                for name in names:
                    if name.removeprefix("test_") not in but:
                        setattr(kind, name, unittest.skip(reason)(lambda self: None))
        return kind

    return decorate
