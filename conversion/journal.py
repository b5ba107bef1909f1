"""What of an interrupted conversion is finished: one JSON line for the run, one for every file that is whole."""

import json
import os
import threading
from pathlib import Path
from typing import Any


JOURNAL_NAME = "journal.jsonl"


class Journal:
    """`done`: what `record` was told about each file, of this run and of those it goes on from.

    Args:
        header: what must be the same for a run to go on: "source" is a fingerprint {file: [bytes, mtime]}, "plan" a
            hash.
        resume: go on from a journal that is there.

    ValueError: the journal there is of another plan or of files that changed since.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool):
        self._path, self._lock = path, threading.Lock()
        self.done: dict[str, dict[str, Any]] = {}
        lines = _whole_lines(path) if resume else []
        if lines:
            _compare(path, lines[0], header)
            self.done = {line["file"]: line for line in lines[1:] if _is_whole(path.parent, line)}
        # a torn last line, and files that are not whole any more, go; the old journal stays until the new one is whole
        anew = path.with_name(path.name + ".partial")
        anew.write_text("".join(json.dumps(line) + "\n" for line in (header, *self.done.values())), encoding="utf-8")
        os.replace(anew, path)
        self._file = path.open("a", encoding="utf-8")

    def record(self, file: str, nbytes: int, sha256: str, **more: Any) -> None:
        """Notes that a file is whole, on the disk, and has its final name."""
        with self._lock:
            self.done[file] = {"file": file, "bytes": nbytes, "sha256": sha256, **more}
            self._file.write(json.dumps(self.done[file]) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # the process may have ended inside the last line
        if text.endswith("\n"):
            lines.append(json.loads(text))
    return lines


def _compare(path: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    for file in sorted(found["source"].keys() | header["source"].keys()):
        before, now = found["source"].get(file), header["source"].get(file)
        if before != now:
            raise ValueError(
                f"source: expected the files that the interrupted run read, got another {file} "
                f"([bytes, mtime] {before}, now {now}); delete {path.parent} and start again."
            )
    if found["plan"] != header["plan"]:
        raise ValueError(
            f"{path.parent}: expected the options of the interrupted run, got others; "
            "give the same, or delete it and start again."
        )


def _is_whole(folder: Path, line: dict[str, Any]) -> bool:
    file = folder / line["file"]
    return file.is_file() and file.stat().st_size == line["bytes"]


__all__ = ["JOURNAL_NAME", "Journal"]
