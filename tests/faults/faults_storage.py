"""Disks that are full or may only be read, a clock set back, and the faults that the unit tests hold; `make faults`."""

import os
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
import stages
from stages import Started, outcome

from codalib.base.paths import project_folder
from codalib.workflow.manifest import Run

EQUAL = "equal to the uninterrupted run"
KNOWN = {  # fault -> what is expected, and the unit tests that hold it
    "a checkpoint with one flipped bit, a truncated newest checkpoint": (
        f"passed over for the one before, then {EQUAL}",
        "training/test_training.py::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
    ),
    "damage to every checkpoint": (
        "one sentence, nothing touched",
        "training/test_training.py::test_damage_to_every_checkpoint_is_one_sentence",
    ),
    "a torn last line of the log": (
        EQUAL,
        "training/test_training.py::test_a_torn_last_line_of_the_log_is_passed_over_and_another_is_named",
    ),
    "two runs in one output folder": (
        "the second is refused in one sentence",
        "base/test_files.py::test_a_run_keeps_its_folder_from_other_processes_until_it_ends",
    ),
    "a pickle among the weights": (
        "none is loaded: `torch.load` with `weights_only=True` alone",
        "models/test_checkpoints.py::test_nothing_loads_a_pickle",
    ),
    "a path in an index of weights that leaves its folder": (
        "refused in one sentence",
        "models/test_checkpoints.py::test_shards_lie_beside_their_index",
    ),
    "a class folder named `<img src=x onerror=alert(1)>`": (
        "stands as text in the pages",
        "reporting/test_report.py::test_names_from_outside_stand_as_they_are",
    ),
}


@pytest.fixture
def disk(tmp_path):
    """Mount an empty disk of so many bytes in memory, or change the one that is mounted."""

    def mount(*options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", tmp_path], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk in memory can be mounted here: {done.stderr.decode().strip() or os.strerror(1)}")
        return tmp_path

    yield mount
    subprocess.run(["umount", tmp_path], check=False, capture_output=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the quantizer's fit gives undisturbed, and the bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert Started(stages.quantizer, folder).finish() is None
    (*_, newest) = sorted(folder.glob("checkpoints/*/step-*"))
    return outcome(folder), sum(file.stat().st_size for file in newest.iterdir())


@pytest.mark.parametrize("room", [0, 0.5, 1.5, 2.5])
def test_a_disk_that_fills_up(room, disk, whole, row):
    expected, size = whole
    folder = disk(f"size={int(size * room) + 16_384}") / "run"
    said = Started(stages.quantizer, folder).finish()
    assert said is not None
    assert "stopped by OSError" in said
    assert str(folder) in said
    disk("remount", "size=64M")
    assert Started(stages.quantizer, folder).finish() is None
    assert outcome(folder) == expected
    happened = f"{said.partition('OSError: ')[2].replace(str(folder), 'FOLDER')}; with room: files and log equal"
    row(f"a disk with room for {room} checkpoints", f"one sentence, then {EQUAL}", happened)


def test_a_folder_that_may_only_be_read(disk, row):
    folder = disk("size=1M") / "run"
    folder.mkdir()
    disk("remount", "ro")
    with pytest.raises(OSError, match=r"expected a folder that can be written, got .*Read-only file system") as error:
        Run(folder, "stage", {}, 0)
    said = Started(stages.quantizer, folder).finish()
    assert "Read-only file system" in said
    happened = str(error.value).replace(str(folder), "FOLDER")
    row("a results folder that may only be read", "one sentence before any work", happened)


def test_a_clock_set_back(tmp_path, whole, row):
    folder = tmp_path / "run"
    run = Started(stages.quantizer, folder)
    while not list(folder.glob("checkpoints/*/step-*[0-9]")):
        assert not run.wait(0.02)
    run.kill()
    for file in folder.rglob("*"):
        os.utime(file, (4e9, 4e9))
    assert Started(stages.quantizer, folder).finish() is None
    assert outcome(folder) == whole[0]
    row("the clock set back: every file of a killed run is of the future", EQUAL, "files and log equal bit for bit")


def test_faults_that_the_unit_tests_hold(tmp_path, row):
    names = [f"{project_folder() / 'tests'}/{name}" for _, name in KNOWN.values()]
    result = tmp_path / "result.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={result}", *names]
    done = subprocess.run(command, cwd=project_folder(), capture_output=True, text=True)
    ran = [case.get("name").partition("[")[0] for case in xml.parse(result).iter("testcase") if not len(case)]
    for fault, (expected, name) in KNOWN.items():
        count = ran.count(name.partition("::")[2])
        row(fault, expected, f"`tests/{name}`: {count} case{'s' * (count != 1)} passed" if count else "FAILED")
    assert done.returncode == 0, done.stdout[-2000:]
