# Copyright 2026 The modeling-mimo authors.
#
# Licensed under the MIT License (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://opensource.org/license/mit
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The installed versions, and whether Transformers is of a line that this package supports."""

from importlib.metadata import requires, version

from packaging.requirements import Requirement


DISTRIBUTION = "modeling-mimo"
__version__ = version(DISTRIBUTION)


def check_transformers(installed: str | None = None) -> None:
    """Raises an `ImportError` for a Transformers, by default the installed one, outside the range that this package
    requires: other lines rename arguments, which ends in wrong answers rather than in errors."""
    installed = installed or version("transformers")
    requirements = map(Requirement, requires(DISTRIBUTION))
    supported = next(found for found in requirements if found.name == "transformers" and not found.extras).specifier
    if not supported.contains(installed, prereleases=True):
        raise ImportError(
            f"modeling-mimo {__version__}: expected transformers {supported}, got {installed}; "
            f"run `pip install 'transformers{supported}'`, or upgrade modeling-mimo."
        )


check_transformers()


__all__ = ["__version__"]
