import hashlib
import json
import os
import pickle
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed

from codalib.base import processes, team
from codalib.base.processes import launch
from codalib.base.team import NEEDED, SIZES, TEAM, Place, Team, TeamError, launched_processes

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in (*SIZES, *NEEDED, TEAM, team.AGENT, "LOCAL_WORLD_SIZE", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # restored at the end, whatever the code took away
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def two():
    """What the two processes of a team say to each other, both in this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = Place("127.0.0.1", probe.getsockname()[1], "0", 0, 0, 2, 1, serves=True)
    return Team(place), Team(replace(place, rank=1, serves=False))


def test_the_launchers_variables_are_taken_away_from_what_is_started_here(environment):
    assert Place.take() is None
    for name, value in LAUNCHED.items():
        environment.setenv(name, value)
    assert Place.take() == Place("first", 29500, "0", 1, 0, 2, 1, serves=False)
    assert not LAUNCHED.keys() & os.environ.keys()
    assert Place.take() is None


@pytest.mark.parametrize(("agent", "serves"), [("", True), ("True", False)])
def test_the_first_process_serves_the_store_where_torchrun_does_not(environment, agent, serves):
    for name, value in {**LAUNCHED, "RANK": "0", team.AGENT: agent}.items():
        environment.setenv(name, value)
    place = Place.take()
    assert place.serves is serves
    assert launched_processes() is None
    place.lead()
    assert launched_processes() == 2
    assert Place.leading() == replace(place, serves=False)


@pytest.mark.parametrize("below", [True, False])
def test_another_number_of_processes_than_the_launchers_is_one_sentence(environment, below):
    if below:
        Place("first", 29500, "0", 0, 0, 16, 8, serves=True).lead()
    else:
        for name, value in {**LAUNCHED, "WORLD_SIZE": "16"}.items():
            environment.setenv(name, value)
    with pytest.raises(ValueError, match="processes is 8, expected 16, as many as the launcher has started"):
        launch(print, 8)


def test_a_call_is_handed_out_and_all_hear_that_it_is_done_and_that_all_has_ended(two):
    first, second = two
    number = first.announce("what to do")
    assert (number, second.next_call(number)) == (1, "what to do")
    first.done(number, "7 GB")
    second.done(number, "8 GB")
    assert first.wait_for_all(number) == ["7 GB", "8 GB"]
    second.leave()
    first.end("the first process stopped")
    with pytest.raises(TeamError, match="the first process stopped"):
        second.check(2)
    assert second.next_call(2) is None
    assert second.leave() == "the first process stopped"


def test_the_first_failure_is_everybodys(two):
    first, second = two
    assert first.failure(1) is None
    assert second.fail(1, "no room") == "no room"
    assert first.fail(1, "connection closed") == "no room"
    for one in two:
        with pytest.raises(TeamError, match=r"^no room$"):
            one.check(1)
        one.check(2)


def test_who_gives_no_sign_of_life_is_lost(two, monkeypatch):
    first, second = two
    second._say("life/1", "0")
    first.watch()
    first.watch()  # in time
    monkeypatch.setattr(team, "SILENCE", -1.0)
    monkeypatch.setattr(first, "_read", {"life/1": b"7", "host/1": b"far"}.get)
    first.watch()
    with pytest.raises(TeamError, match=r"process 2 of 2 on far has given no sign of life for 0 s: start all again"):
        first.watch()


def test_a_store_that_has_gone_is_one_sentence(two, monkeypatch):
    def gone(*_):
        raise torch.distributed.DistNetworkError("Broken pipe")

    monkeypatch.setattr(two[1], "store", SimpleNamespace(check=gone, set=gone))
    with pytest.raises(TeamError, match=r"process 2 of 2 on \S+ does not reach 127.0.0.1:\d+, where all meet"):
        two[1].next_call(1)


def test_a_disk_that_is_not_shared_is_one_sentence(two, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "DISK", -1.0)
    with pytest.raises(
        FileNotFoundError, match=r"there, which process 1 has written, is not to be seen here: expected one"
    ):
        processes._read_call(two[1], str(tmp_path / "there"), "")


def test_a_call_that_is_not_the_first_processs_own_is_not_read(two, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "DISK", -1.0)
    (tmp_path / "call").write_bytes(pickle.dumps((print, ())))
    with pytest.raises(FileNotFoundError, match="is not to be seen here"):
        processes._read_call(two[1], str(tmp_path / "call"), hashlib.sha256(b"another").hexdigest())


def test_what_is_handed_out_lies_on_the_shared_disk_while_it_is_needed(two, monkeypatch, tmp_path):
    monkeypatch.setenv("CODALIB_RUNS", str(tmp_path))
    read, peaks = [], {}
    monkeypatch.setattr(processes, "note_peaks", peaks.__setitem__)

    def other(first, number, *_):
        function, arguments = processes._read_call(two[1], *json.loads(two[1].next_call(number)))
        read.append((function, arguments, list((tmp_path / processes.CALLS).iterdir())))
        for one in two:
            one.done(number, json.dumps({"peak_memory_bytes": 7}))

    monkeypatch.setattr(processes, "_take_part", other)
    processes._hand_out(two[0], print, (1, "two"))
    ((function, arguments, files),) = read
    assert (function, arguments, len(files)) == (print, (1, "two"), 1)
    assert peaks == {rank: {"peak_memory_bytes": 7} for rank in (0, 1)}
    assert not list((tmp_path / processes.CALLS).iterdir())
