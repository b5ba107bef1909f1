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
"""The small trained model that comes with this package."""

from pathlib import Path


def micro() -> str:
    """Folder of MiMo-Micro, 6M parameters that see, hear, read and draft, in the released FP8 format.

    Not Xiaomi's weights: README.md in the folder says how they were made and what they can do.

    ```python
    >>> model = AutoModelForImageTextToText.from_pretrained(modeling_mimo.micro())
    ```

    Raises:
        FileNotFoundError: an installation without the package's data.
    """
    folder = Path(__file__).parent / "data" / "micro"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"micro: expected the package's data in {folder}, got none; install the package anew")
    return str(folder)


__all__ = ["micro"]
