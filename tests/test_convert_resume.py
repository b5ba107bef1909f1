"""A conversion that ends in the middle: nothing loads as if complete, and going on gives the same bytes."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_convert import digests, read_json, write_json

from modeling_mimo.checkpoint_mimo_v2 import Checkpoint
from modeling_mimo.conversion.convert_mimo_v2_to_hf import convert
from modeling_mimo.conversion.journal import JOURNAL_NAME
from modeling_mimo.conversion.shard_worker import MemoryBudget


pytestmark = pytest.mark.usefixtures("one_thread")

# many small files in every dtype that is worked for, quick enough to be killed often
OPTIONS = {"dtype": "bf16", "layout": "split", "shard_size": "500KB"}


def run(*arguments, **options):
    return convert(*arguments, progress=False, **options)


@pytest.fixture
def source(checkpoints, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(checkpoints["fp8_fused"], tmp_path / "source")


class Moments:
    """Counts what this process does to files; with number `last` it is killed, a write is done by half before."""

    def __init__(self, last=None):
        self.last, self.passed, self.pwrite = last, itertools.count(1), os.pwrite
        os.pwrite, os.fsync = self.write, self.before(os.fsync)
        sys.addaudithook(lambda event, _: (event == "open" or event.startswith("os.")) and self.pass_by())

    def pass_by(self, do=lambda: None):
        if next(self.passed) == self.last:
            do()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, function):
        return lambda *args: (self.pass_by(), function(*args))[1]

    def write(self, file, data, offset):
        self.pass_by(lambda: self.pwrite(file, data[: len(data) // 2], offset))
        return self.pwrite(file, data, offset)


def convert_in_a_process(source, out, last=None, count=None, **options):
    """Converts in a forked process, going on with what is there; returns whether it was killed at moment `last`.

    count: a file to write the number of its moments to.
    """
    process = os.fork()
    if not process:
        status = 1
        try:
            moments = Moments(last)
            run(source, out, resume=True, **options)
            if count is not None:
                count.write_text(str(next(moments.passed)))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def finished_files(partial):
    """{file: (inode, mtime)} of the files that a torn journal knows to be whole."""
    journal = partial / JOURNAL_NAME
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    names = [json.loads(line)["file"] for line in lines[1:] if line.endswith("\n")]
    stats = {name: (partial / name).stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(checkpoints, tmp_path, jobs):
    source, out, partial = checkpoints["fp8_omni"], tmp_path / "out", tmp_path / "out.partial"
    assert not convert_in_a_process(source, tmp_path / "whole", count=tmp_path / "count", jobs=jobs, **OPTIONS)
    moments = int((tmp_path / "count").read_text())
    expected = digests(tmp_path / "whole")
    choose, kills, done = random.Random(jobs), 0, {}
    while kills < 10:
        kills += convert_in_a_process(source, out, choose.randint(1, moments // 3), jobs=jobs, **OPTIONS)
        if out.exists():
            # the whole folder has its name, or the last step alone was missing
            if (out / JOURNAL_NAME).exists():
                run(source, out, resume=True, **OPTIONS)
            assert digests(out) == expected
            shutil.rmtree(out)
            done = {}
        else:
            found = finished_files(partial)
            # finished files are not made again
            assert done.items() <= found.items()
            done = found
    run(source, out, resume=True, jobs=jobs, **OPTIONS)
    assert digests(out) == expected
    assert not partial.exists()


def stopped_after(monkeypatch, count, source, out, error, **options):
    """Runs until the `count`-th write, which fails with `error`."""
    real, calls = os.pwrite, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > count:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(type(error)) as caught:
            run(source, out, **OPTIONS, **options)
    return str(caught.value)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_is_one_line_and_what_is_finished_stays(source, tmp_path, monkeypatch, jobs):
    run(source, tmp_path / "whole", **OPTIONS)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = stopped_after(monkeypatch, 80, source, tmp_path / "out", full, jobs=jobs)
    assert "No space left on device" in message
    assert "run again with --resume" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
    with pytest.raises((ValueError, FileNotFoundError)):
        Checkpoint.from_folder(tmp_path / "out.partial")
    assert finished_files(tmp_path / "out.partial")
    run(source, tmp_path / "out", resume=True, jobs=jobs, **OPTIONS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_read_error_is_one_line(source, tmp_path, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match=r"Input/output error .*run again with --resume"):
            run(source, tmp_path / "out")
    run(source, tmp_path / "out", resume=True)


def test_a_source_that_is_cut_while_it_is_read_is_an_error(source, tmp_path, monkeypatch):
    real = os.pwrite

    def cutting(*arguments):
        for file in source.glob("model_pp0*"):
            os.truncate(file, 100)
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", cutting)
    with pytest.raises(OSError, match=r"expected .* more bytes at .*, got the end"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def interrupt(monkeypatch, source, out, count=80):
    stopped_after(monkeypatch, count, source, out, OSError(errno.ENOSPC, "full"))


@pytest.mark.parametrize("name", ["model_mtp.safetensors", "config.json", "generation_config.json"])
def test_a_source_that_changed_since_is_an_error(source, tmp_path, monkeypatch, name):
    interrupt(monkeypatch, source, tmp_path / "out")
    os.utime(source / name)
    with pytest.raises(ValueError, match=f"expected the files that the interrupted run read, got another {name}"):
        run(source, tmp_path / "out", resume=True, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_meanwhile_is_an_error(source, tmp_path, monkeypatch):
    real = os.fsync

    def touching(file):
        os.utime(source / "model_mtp.safetensors")
        return real(file)

    monkeypatch.setattr(os, "fsync", touching)
    with pytest.raises(ValueError, match="got a change while"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()


def test_other_options_do_not_go_on(source, tmp_path, monkeypatch):
    interrupt(monkeypatch, source, tmp_path / "out")
    with pytest.raises(ValueError, match="expected the options of the interrupted run"):
        run(source, tmp_path / "out", resume=True, **OPTIONS | {"dtype": "fp16"})
    with pytest.raises(ValueError, match="--resume goes on with it"):
        run(source, tmp_path / "out", **OPTIONS)


def test_a_torn_journal_and_a_lost_file_are_made_good(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole", **OPTIONS)
    interrupt(monkeypatch, source, tmp_path / "out")
    partial = tmp_path / "out.partial"
    names = list(finished_files(partial))
    (partial / names[0]).unlink()
    (partial / names[1]).write_bytes(b"short")
    with (partial / JOURNAL_NAME).open("a") as journal:
        journal.write('{"file": "model-000')
    run(source, tmp_path / "out", resume=True, **OPTIONS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_last_step_alone_can_be_missing(source, tmp_path, monkeypatch):
    run(source, tmp_path / "whole", **OPTIONS)
    real = os.rename

    def renaming(before, after):
        real(before, after)
        if str(after) == str(tmp_path / "out"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", renaming)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", **OPTIONS)
    run(source, tmp_path / "out", resume=True, **OPTIONS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_any_number_of_jobs_writes_the_same_bytes(checkpoints, tmp_path):
    reports = []
    for jobs in (1, 3):
        options = {"dtype": "fp8", "shard_size": "300KB", "jobs": jobs}
        reports.append(run(checkpoints["bf16_fused"], tmp_path / str(jobs), **options).to_dict())
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
    assert reports[0]["errors"] == reports[1]["errors"]


def test_a_destination_that_is_in_the_way_stays(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    run(source, out)
    before = digests(out)
    for options in ({}, {"resume": True}):
        with pytest.raises(ValueError, match="expected a new or an empty folder"):
            run(source, out, **options)
    assert digests(out) == before
    with pytest.raises(ValueError, match="expected a folder outside of the source"):
        run(source, source / "inside")


def test_no_room_is_said_before_the_first_shard(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"expected \d+ bytes free on its disk, got 1000"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out.partial").glob("*.safetensors*"))


def test_a_source_without_change_goes_on_even_if_it_is_written_again(source, tmp_path, monkeypatch):
    """The fingerprint is size and time: a copy with its times kept is the same source."""
    interrupt(monkeypatch, source, tmp_path / "out")
    stat = (source / "config.json").stat()
    write_json(source, read_json(source))
    (source / "config.json").write_text(json.dumps(read_json(source), indent=2))
    os.utime(source / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run(source, tmp_path / "out", resume=True, **OPTIONS)


def test_tasks_wait_until_their_bytes_fit():
    budget, alive, most = MemoryBudget(100), [], []

    def task(nbytes):
        with budget.hold(nbytes):
            alive.append(nbytes)
            most.append(sum(alive))
            # others may go ahead
            os.sched_yield()
            alive.remove(nbytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(task, [60, 50, 40, 100, 10, 30] * 5))
    assert len(most) == 30
    assert 50 < max(most) <= 100
