"""Locks end with their process; folders are replaced whole; digests of files follow their bytes."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from codalib.base import files
from codalib.base.files import atomic_folder, atomic_write, file_digest, hold, release, writing
from codalib.workflow.manifest import Run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(files, "SETTLED", -1)  # every file has settled
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_a_digest_follows_the_bytes_where_size_and_mtime_stay(runs, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before = file.stat()
    assert file_digest(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(file) == hashlib.sha256(b"two").hexdigest()


def test_an_unchanged_file_is_read_once_by_any_process(runs, tmp_path, monkeypatch):
    file = tmp_path / "with\na newline"
    file.write_bytes(b"one")
    found = file_digest(file)
    (kept,) = (runs / "digests").iterdir()
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert file_digest(file) == found
    (tmp_path / "link").symlink_to(file)
    assert file_digest(tmp_path / "link") == found
    monkeypatch.undo()
    for damaged in ('{"torn', "[]", '{"with\\na newline": [3]}'):
        kept.write_text(damaged)
        assert file_digest(file) == found


def test_json_has_its_lists_of_numbers_on_one_line_and_its_texts_as_they_are(tmp_path):
    value = {
        "a": [1, -2.5e-7, None, True],
        "b": ["[\n 1,\n 2\n]", "[ 1,  2 ]"],
        "c": [[3, 4], [], {"d": [5]}],
        "e": [6],
    }
    files.write_json(tmp_path / "kept.json", value)
    assert files.read_json(tmp_path / "kept.json") == value
    text = (tmp_path / "kept.json").read_text()
    assert '"a": [1, -2.5e-07, null, true],' in text
    assert "[3, 4],\n" in text
    assert '"e": [6]\n}\n' in text


def test_json_that_is_torn_or_lacks_a_key_is_named(tmp_path):
    for contents, said in (('{"row": 1', "is not a JSON file"), ('{"rows": 1}', "'row'"), ("[1]", "'row'")):
        (tmp_path / "kept.json").write_text(contents)
        with pytest.raises(ValueError, match=rf"kept.json .*{said}.*: remove it and run its stage again"):
            files.read_json(tmp_path / "kept.json", "row")


def test_a_file_that_has_just_changed_is_not_kept(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", 10**12)
    (tmp_path / "weights").write_bytes(b"one")
    file_digest(tmp_path / "weights")
    assert not (runs / "digests").exists()


def test_a_link_that_leads_elsewhere_is_another_file(runs, tmp_path, monkeypatch):
    """To a file of the same size, made within the same tick of the clock."""
    made, real = [tmp_path / "a", tmp_path / "b"], os.stat
    for path in made:
        path.write_text(path.name)

    def alike(path, **options):
        found, names = real(path, **options), ("st_ino", "st_mode", "st_size")
        return SimpleNamespace(**{name: getattr(found, name) for name in names}, st_mtime_ns=1, st_ctime_ns=1)

    monkeypatch.setattr(os, "stat", alike)
    link, found = tmp_path / "link", []
    for path in made:
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        found.append(files.file_digests([str(link)])[str(link)])
    assert found == [hashlib.sha256(text).hexdigest() for text in (b"a", b"b")]


def test_a_file_that_cannot_be_read_has_no_digest(runs, tmp_path):
    assert files.file_digests([str(tmp_path / "missing")]) == {str(tmp_path / "missing"): ""}
    with pytest.raises(OSError, match="expected a file that can be read"):
        file_digest(tmp_path / "missing")


def test_without_a_folder_of_runs_nothing_is_written(runs, tmp_path):
    runs.rmdir()
    (tmp_path / "weights").write_bytes(b"one")
    assert file_digest(tmp_path / "weights") == hashlib.sha256(b"one").hexdigest()
    assert not runs.exists()


def test_two_writers_of_a_folder_leave_each_others_files_alone(tmp_path):
    with atomic_folder(tmp_path / "model") as first:
        (first / "weights").write_text("first")
        with atomic_folder(tmp_path / "model") as second:
            (second / "weights").write_text("second")
        assert (tmp_path / "model" / "weights").read_text() == "second"
    assert (tmp_path / "model" / "weights").read_text() == "first"
    with pytest.raises(TypeError), atomic_folder(tmp_path / "model") as third:
        (third / "weights").write_text(3)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


HOLDER = """import sys, time
from codalib.workflow.manifest import Run
run = Run(sys.argv[1], "stage", {}, 0)
print("held", flush=True)
time.sleep(60)"""


def test_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/table\.csv'"),
        atomic_write(tmp_path / "table.csv"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert not list(tmp_path.iterdir())


def test_a_run_keeps_its_folder_from_other_processes_until_it_ends(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            BlockingIOError, match=rf"run is in use, running already in process {holder.pid} on \S+: wait"
        ):
            Run(tmp_path / "run", "stage", {}, 0)
        Run(tmp_path / "other", "stage", {}, 0).finish()  # another folder is free
        os.kill(holder.pid, signal.SIGKILL)
    Run(tmp_path / "run", "stage", {}, 0)
    Run(tmp_path / "run", "stage", {}, 0).finish()  # a notebook's cell run again


def test_a_lock_is_given_back(tmp_path):
    hold(tmp_path / "a.lock")
    release(tmp_path / "a.lock")
    release(tmp_path / "a.lock")
    hold(tmp_path / "a.lock")
    release(tmp_path / "a.lock")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(OSError, match=r"expected a folder that can be written, got .*run \("):
            Run(place, "stage", {}, 0)
        with pytest.raises(OSError, match="make room or mend its rights"), writing(place):
            pass
