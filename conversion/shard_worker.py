"""Makes the planned files: reads, converts and writes tensor by tensor, under a ceiling of memory."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from .checkpoint import SafetensorsSource, Source
from .converters import PIECE_BYTES, Conversion
from .journal import Journal
from .shard_plan import Shard
from .shard_writer import ShardWriter, file_order
from .stored_weight import Difference, difference


class Stopped(Exception):
    """Another worker failed; its error is the one to report."""


class MemoryBudget:
    """Lets tasks run as long as the bytes they announce fit into `limit` together."""

    def __init__(self, limit: int):
        self._free, self._changed = limit, threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= nbytes)
            self._free -= nbytes
        try:
            yield
        finally:
            with self._changed:
                self._free += nbytes
                self._changed.notify_all()


class ShardWorker:
    """Writes shards and companion files into `folder` and notes each one in the journal.

    Args:
        advance: called with the number of bytes that were written.
    """

    def __init__(
        self, source: Source, folder: Path, journal: Journal, max_memory: int, advance: Callable[[int], object]
    ):
        self._source, self._folder, self._journal = source, folder, journal
        self._budget, self._advance = MemoryBudget(max_memory), advance
        self._stop, self._own = threading.Event(), threading.local()

    def run(self, shards: list[Shard], copies: dict[str, Path], jobs: int) -> None:
        """Everything that is not done yet; the first error ends it, with finished files kept.

        OSError: a disk that is full or fails, naming the file. ValueError: a weight that the target cannot hold.
        """
        tasks = [(self._write_shard, shard.file, shard) for shard in shards]
        tasks += [(self._copy_file, name, path) for name, path in copies.items()]
        tasks = [task for task in tasks if task[1] not in self._journal.done]
        if jobs == 1:
            for function, name, what in tasks:
                self._guarded(function, name, what)
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // jobs))
        try:
            with ThreadPoolExecutor(jobs) as pool:
                futures = [pool.submit(self._guarded, *task) for task in tasks]
                try:
                    wait(futures, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()
                    for future in futures:
                        future.cancel()
            errors = [future.exception() for future in futures if not future.cancelled()]
            for error in errors:
                if error is not None and not isinstance(error, Stopped):
                    raise error
        finally:
            torch.set_num_threads(threads)

    def _guarded(self, function: Callable, name: str, what: Shard | Path) -> None:
        try:
            function(name, what)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error} ({error.filename or self._folder / name}); "
                f"what is finished stays in {self._folder}: run again with --resume",
            ) from error

    def _write_shard(self, name: str, shard: Shard) -> None:
        differences: dict[str, Difference] = {}
        writer = ShardWriter(self._folder / name, shard.tensors, shard.metadata)
        try:
            pieces = {out: item for item in shard.conversions if item.is_rowwise for out in item.outputs}
            for out in file_order(shard.tensors):
                if out in pieces and pieces[out].is_copy and isinstance(self._source, SafetensorsSource):
                    self._copy_tensor(self._source, writer, out)
                elif out in pieces:
                    self._stream(writer, pieces[out], out, differences)
            for conversion in shard.conversions:
                if not conversion.is_rowwise:
                    with self._budget.hold(conversion.peak_bytes):
                        self._convert(writer, conversion, differences)
            sha256 = writer.finish()
        finally:
            writer.close()
        errors = {group: list(total) for group, total in differences.items()}
        self._journal.record(name, writer.size, sha256, tensors=len(shard.tensors), errors=errors)

    def _copy_tensor(self, source: SafetensorsSource, writer: ShardWriter, name: str) -> None:
        """The bytes of a tensor through one buffer per thread: new memory costs more than copying."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(PIECE_BYTES))
        nbytes = writer.tensors[name].nbytes
        for start in range(0, nbytes, PIECE_BYTES):
            self._check_stop()
            piece = self._own.buffer[: min(PIECE_BYTES, nbytes - start)]
            source.read_into(name, start, piece)
            writer.write_bytes(name, start, piece)
            self._advance(len(piece))

    def _stream(
        self, writer: ShardWriter, conversion: Conversion, name: str, differences: dict[str, Difference]
    ) -> None:
        """One tensor as it is, or cast, in pieces of whole rows."""
        info = self._source.tensors[name]
        rows = info.shape[0] if info.nbytes > PIECE_BYTES else 1
        step = max(1, PIECE_BYTES * rows // info.nbytes) if rows > 1 else 1
        for start in range(0, rows, step):
            self._check_stop()
            with self._budget.hold(conversion.peak_bytes):
                stop = min(start + step, rows)
                data = self._source.read(name) if rows == 1 else self._source.read_rows(name, start, stop)
                if not conversion.is_copy:
                    weight = next(weight for weight in conversion.target if weight.name == name)
                    before, data = data, weight.store(data)[name]
                    if conversion.is_measured:
                        error = difference(before.float(), data.float())
                        # counted once, with its first rows
                        _add(differences, conversion.group, error if start == 0 else error._replace(tensors=0))
                writer.write_rows(name, data, start)
            self._advance(data.nbytes)

    def _convert(self, writer: ShardWriter, conversion: Conversion, differences: dict[str, Difference]) -> None:
        self._check_stop()
        inputs = {name: self._source.read(name) for name in conversion.inputs}
        outputs = conversion.process(inputs)
        # a weight whose scale lies in the next file is made for both, and counted with the weight
        if conversion.is_measured and conversion.target[0].name in writer.tensors:
            _add(differences, conversion.group, conversion.measure(inputs, outputs))
        for name, tensor in outputs.items():
            if name in writer.tensors:
                writer.write(name, tensor)
                self._advance(tensor.nbytes)

    def _copy_file(self, name: str, path: Path) -> None:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        digest = hashlib.sha256()
        with path.open("rb") as source, partial.open("wb") as copy:
            while piece := source.read(PIECE_BYTES):
                self._check_stop()
                digest.update(piece)
                copy.write(piece)
                self._advance(len(piece))
            copy.flush()
            os.fsync(copy.fileno())
        shutil.copymode(path, partial)
        os.rename(partial, target)
        self._journal.record(name, target.stat().st_size, digest.hexdigest())

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _add(differences: dict[str, Difference], group: str, error: Difference) -> None:
    differences[group] = differences.get(group, Difference()) + error


__all__ = ["MemoryBudget", "ShardWorker", "Stopped"]
