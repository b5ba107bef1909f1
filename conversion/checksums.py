"""Lists of sha256 sums that `sha256sum -c` reads: written for a folder, or checked against it."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


# bytes per read: large enough to keep a disk busy, small beside everything else in memory
STEP = 2**24

# the largest list that is read; the 200 files of the largest release take 20 kB
MAX_BYTES = 10_000_000

# what downloaders and version control keep in a checkpoint's folder
SKIPPED_FOLDERS = (".cache", ".git", "__pycache__")
SKIPPED_SUFFIXES = (".incomplete", ".partial", ".lock")


def files_below(folder: Path) -> list[Path]:
    """Files of a checkpoint, relative to its folder, in the order of their names; no link to a folder is followed."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths = (Path(place, name) for name in names if not name.endswith(SKIPPED_SUFFIXES))
        found += [path.relative_to(folder) for path in paths if path.is_file()]
    return sorted(found)


def sha256(path: Path, advance: Callable[[int], object]) -> str:
    """Hex digest of a file; `advance` gets the number of bytes after every read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(STEP))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            advance(count)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Path, files: list[Path], advance: Callable[[int], object]) -> None:
    """One line `<sha256>  <path>` per file of `folder`, with `/` between names.

    The list is renamed into place at the end. ValueError: a name with a line break or a backslash.
    """
    odd = [str(file) for file in files if any(mark in str(file) for mark in "\n\r\\")]
    if odd:
        raise ValueError(f"{folder}: expected file names without line breaks and backslashes, got {odd[0]!r}.")
    lines = [f"{sha256(folder / file, advance)}  {file.as_posix()}\n" for file in files]
    partial = manifest.with_name(manifest.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(manifest)


def read_manifest(manifest: Path) -> dict[Path, str]:
    """Sum by path, as `sha256sum` writes them (text or binary mode).

    ValueError: no such list, a path that leaves the folder, or one path twice.
    """
    if (size := manifest.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{manifest}: expected at most {MAX_BYTES} bytes of sums, got {size}.")
    sums: dict[Path, str] = {}
    for number, line in enumerate(manifest.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        digest, mode, name = line[:64].lower(), line[64:66], line[66:]
        path = Path(name)
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or mode not in ("  ", " *") or not name:
            raise ValueError(f"{manifest}: line {number}: expected `<sha256>  <path>`, got {line[:80]!r}.")
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{manifest}: line {number}: expected a path inside the folder, got {name[:80]!r}.")
        if path in sums:
            raise ValueError(f"{manifest}: line {number}: expected every path once, got {name[:80]!r} again.")
        sums[path] = digest
    if not sums:
        raise ValueError(f"{manifest}: expected at least one line `<sha256>  <path>`, got none.")
    return sums


def check_manifest(folder: Path, sums: dict[Path, str], advance: Callable[[int], object]) -> Iterator[str]:
    """One line per file that is missing, differs, or holds weights and is not listed."""
    for path, expected in sums.items():
        if not (folder / path).is_file():
            yield f"{path}: in the list of sums, but there is no such file"
        elif (got := sha256(folder / path, advance)) != expected:
            yield f"{path}: expected sha256 {expected}, got {got}"
    for path in files_below(folder):
        if path.suffix == ".safetensors" and path not in sums:
            yield f"{path}: weights that the list of sums does not have"
