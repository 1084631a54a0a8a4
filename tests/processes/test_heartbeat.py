"""What the signs of life of a run's processes say of them, without processes: the judgement alone."""

import os
import socket
import subprocess

import pytest

from scaling_testbed.processes.heartbeat import DEAD_SECONDS, SILENT_SECONDS, STILL_SECONDS, Beat, _exists, _Watch
from scaling_testbed.processes.world import World

HERE = socket.gethostname()
LIMIT = 600.0


def beat(number, moves, *, alone=False, host=HERE, pid=None):
    place = "all_reduce of make_update (training/step.py:1)"
    return Beat(number, moves, 7, place, alone, host, os.getpid() if pid is None else pid, None)


class Looking:
    """A watch of rank 0 (or another) that looks every second at beats that `there` makes from the second."""

    def __init__(self, there, *, size=2, rank=0, keeper=False, late=None, lost=None, reads=lambda second: second):
        self.watch = _Watch(World(rank, size), LIMIT, 2.0, keeper=keeper)
        self.there, self.late, self.lost, self.reads = there, late, lost, reads

    def finding(self, seconds):
        """(second, finding) of the first finding within `seconds`, or None."""
        for second in range(1, seconds + 1):
            found = self.watch.look(1.0, self.reads(second), self.there(second), beat(second, 0), self.late, self.lost)
            if found is not None:
                return second, found
        return None


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_processes_that_move_are_left_alone():
    assert Looking(lambda s: {0: beat(s, s), 1: beat(s, s - 1)}).finding(3000) is None


def test_a_process_that_lags_while_another_waits_hangs():
    """Rank 1 is two collectives behind, and neither moves."""
    second, found = Looking(lambda s: {0: beat(s, 9), 1: beat(s, 7)}).finding(3000)
    assert (found.rank, found.hangs) == (1, True) and LIMIT <= second <= LIMIT + 3
    assert "rank 1 hangs at step 7" in found.error and "while rank 0 waits in all_reduce" in found.error
    second, found = Looking(lambda s: {0: beat(s, 7), 1: beat(s, 9)}).finding(3000)
    assert found.rank == 0  # it says so of itself


def test_nobody_waits_too_long_while_one_works_alone_or_all_compute():
    assert Looking(lambda s: {0: beat(s, 9, alone=True), 1: beat(s, 9)}).finding(5000) is None
    second, found = Looking(lambda s: {0: beat(s, 9), 1: beat(s, 9)}).finding(5000)
    assert second >= max(STILL_SECONDS, 2 * LIMIT) and found.rank is None and "all ranks hang" in found.error


def test_a_process_without_a_sign_of_life_is_gone_or_hangs():
    gone = dead_pid()
    second, found = Looking(lambda s: {0: beat(s, s), 1: beat(1, 1, pid=gone)}).finding(3000)
    assert not found.hangs and "has ended" in found.error and second <= DEAD_SECONDS + 5
    second, found = Looking(lambda s: {0: beat(s, s), 1: beat(1, 1)}).finding(3000)  # its process is there
    assert found.hangs and LIMIT <= second <= LIMIT + 3 and "no sign of life" in found.error
    second, found = Looking(lambda s: {0: beat(s, s), 1: beat(1, 1, host="elsewhere")}).finding(3000)
    assert not found.hangs and SILENT_SECONDS <= second <= SILENT_SECONDS + 3


def test_a_store_that_does_not_answer_or_is_gone():
    second, found = Looking(lambda s: {}, rank=1, keeper=True, reads=lambda _: 0).finding(3000)
    assert (found.rank, found.hangs) == (0, True) and second >= LIMIT and "rank 0 hangs" in found.error
    _, found = Looking(lambda s: {}, rank=1, keeper=True, lost="reset").finding(1)
    assert (found.rank, found.hangs) == (0, False) and "rank 0 is gone" in found.error
    _, found = Looking(lambda s: {}, rank=1, lost="reset").finding(1)
    assert found.rank is None


def test_a_process_that_never_begins():
    second, found = Looking(lambda s: {}, late=1).finding(3000)
    assert (found.rank, found.hangs) == (1, True) and second == LIMIT and "before it has begun" in found.error


@pytest.mark.parametrize("rank", [1, 3])
def test_only_rank_0_judges_who_lags(rank):
    there = lambda s: {0: beat(s, 9), rank: beat(s, 7)}  # noqa: E731
    assert Looking(there, size=4, rank=rank).finding(3000) is None


def test_time_in_which_the_store_did_not_answer_or_this_process_was_suspended_does_not_count():
    """For 598 s no beats are read. Then those of rank 1 are the old ones for 9 s, and after that new ones."""
    silent = lambda s: beat(5, 5) if 5 <= s < 612 else beat(s, s)  # noqa: E731
    slow = Looking(lambda s: {0: beat(s, s), 1: silent(s)}, reads=lambda s: 5 if 5 <= s < 603 else s)
    assert slow.finding(3000) is None
    suspended = Looking(lambda s: {0: beat(s, s), 1: beat(1, 1)})
    assert suspended.finding(3) is None
    assert suspended.watch.look(3 * LIMIT, 4, {0: beat(4, 4), 1: beat(1, 1)}, beat(4, 0), None, None) is None


def test_a_process_that_ended_and_was_not_waited_for_is_gone():
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not _exists(process.pid)
    assert _exists(os.getpid())


def test_a_store_that_stops_before_the_others_were_seen_to_begin_hangs_where_this_process_is():
    """The only answer came before rank 0 had begun to beat; rank 1 is in its seventh step."""
    _, found = Looking(lambda s: {}, rank=1, keeper=True, late=0, reads=lambda _: 1).finding(3000)
    assert found.hangs and found.error.startswith("rank 0 hangs at step 7: no sign of life")
