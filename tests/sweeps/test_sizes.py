"""An array job for each size of run: its GPUs, its time limit, and what is refused before anything is sent."""

import re
import subprocess
from pathlib import Path

import pytest

from scaling_testbed.config.compose import CONFIG_DIR, compose, fill
from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps import slurm
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan
from scaling_testbed.sweeps.sizes import START_SECONDS, check_limit, short_limits, sizes, spelled
from scaling_testbed.sweeps.slurm import Partition, SlurmConfig, seconds_of, task_line
from scaling_testbed.sweeps.speed import priced, stated
from tests.sweeps.cluster import squeue, until

DAY = Partition("gpu", 86400)


@pytest.fixture(scope="module")
def proxies():
    """A run of 20 million parameters and one of 1.3 billion, with their hours at 4e14 FLOP/s: 0.6 and 72."""
    runs, _ = plan(narrowed(load_sweep("qknorm_lr"), ["model=proxy_2m,proxy_1b", "optimizer.lr=1e-2"]))
    return priced(runs, stated(4e14, True))


def test_runs_with_equal_needs_are_one_array_job_as_they_were(proxies):
    config = SlurmConfig(time="8:00:00", partition="gpu")
    (one,) = sizes(proxies, config)
    assert (one.runs, one.config) == (proxies, config) and one.n_gpus == 1


def test_an_automatic_limit_is_the_estimate_with_its_margin_and_never_above_the_partition(proxies):
    small, large = sizes(proxies, SlurmConfig(time="auto"))
    for size, run in ((small, proxies[0]), (large, proxies[-1])):
        needed = 1.5 * run.gpu_hours * 3600 + START_SECONDS + 120
        assert needed <= seconds_of(size.config.time) <= 1.25 * needed + 1800
    wider, _ = sizes(proxies, SlurmConfig(time="auto", time_margin=4))
    assert seconds_of(wider.config.time) >= 4 * proxies[0].gpu_hours * 3600 + START_SECONDS
    short, cut = sizes(proxies, SlurmConfig(time="auto"), DAY)
    assert (short.config.time, cut.config.time) == (small.config.time, "1-00:00:00")
    assert sizes(proxies, SlurmConfig(time="auto"), Partition("x", None))[1].config.time == large.config.time


def test_runs_on_several_gpus_take_their_part_of_the_hours(proxies):
    from dataclasses import replace

    alone, together = proxies[-1], replace(proxies[-1], processes=8)
    limits = [seconds_of(sizes([run], SlurmConfig(time="auto"))[0].config.time) for run in (alone, together)]
    assert 7 < limits[0] / limits[1] < 9


@pytest.mark.parametrize("seconds", [1, 60, 3599, 3600, 36000, 86399, 86400, 90061, 10 * 86400])
def test_a_limit_is_spelled_as_sbatch_reads_it(seconds):
    assert seconds_of(spelled(seconds)) == seconds


def test_without_a_speed_an_automatic_limit_is_refused_with_what_to_type(door):
    status, out, err = door("submit", "--dry-run", "launcher.time=auto")
    assert status == 2 and "give --flops-per-second, such as 4e14, or a limit, such as launcher.time=8:00:00" in err
    assert len(err.splitlines()) == 1 and "#SBATCH" not in out


def test_a_limit_that_is_shorter_than_a_run_says_what_becomes_of_the_run(proxies):
    assert short_limits(sizes(proxies, SlurmConfig(time="4-00:00:00"))) == []
    (line,) = short_limits(sizes(proxies, SlurmConfig(time="auto"), DAY))
    assert line.startswith("proxy_1b: a run takes about ") and "about 4 starts in all" in line
    (few,) = short_limits(sizes(proxies, SlurmConfig(time="1:00:00", max_restarts=3)))
    assert "type launcher.max_restarts=" in few
    (ends,) = short_limits(sizes(proxies, SlurmConfig(time="8:00:00", requeue=False)))
    assert "the same submit continues it from its last checkpoint" in ends


def test_a_limit_above_that_of_the_partition_is_refused():
    for fine in (SlurmConfig(time="1-00"), SlurmConfig(), SlurmConfig(time="UNLIMITED"), SlurmConfig(time="auto")):
        check_limit(fine, DAY)
    check_limit(SlurmConfig(time="2-00"), None)
    check_limit(SlurmConfig(time="2-00", qos="long"), DAY)  # which may lift the limit
    with pytest.raises(
        ConfigError, match="above the limit of partition gpu, which is 1-00:00:00; type launcher.time=1-"
    ):
        check_limit(SlurmConfig(time="2-00"), DAY)


def test_the_partition_is_that_of_the_job(monkeypatch):
    said = (
        "PartitionName=debug AllowGroups=ALL Default=NO MaxTime=00:30:00 State=UP\n"
        "PartitionName=gpu Default=YES MaxTime=1-00:00:00 State=UP\n"
        "PartitionName=long Default=NO MaxTime=UNLIMITED State=UP\n"
    )
    monkeypatch.setattr(slurm, "_ask", lambda *_: subprocess.CompletedProcess([], 0, said, ""))
    assert slurm.partition(None) == DAY and slurm.partition("long") == Partition("long", None)
    assert slurm.partition("long,debug") == Partition("debug", 1800) and slurm.partition("nowhere") is None
    monkeypatch.setattr(slurm, "_ask", lambda *_: subprocess.CompletedProcess([], 1, "", "no"))
    assert slurm.partition(None) is None


def test_each_run_has_the_fewest_gpus_with_which_it_fits_and_stays_the_same_run():
    typed = ["model=proxy_2m,proxy_5b", "optimizer.lr=1e-2", "model.qk_norm=layernorm"]
    sweep = narrowed(load_sweep("qknorm_lr"), typed)
    plain, _ = plan(sweep)
    runs, _ = plan(sweep, fewest_gpus=True)
    assert [run.fits for run in plain] == [True, False] and all(run.fits for run in runs)
    assert [run.run_id for run in runs] == [run.run_id for run in plain] and runs[0] == plain[0]
    assert [(run.processes, run.nodes) for run in runs] == [(1, 1), (8, 1)]
    one, eight = sizes(runs, SlurmConfig(gpus_per_node="auto"))
    assert (one.n_gpus, eight.n_gpus) == (1, 8)
    folder, *words = re.split(" ", task_line(runs[1], eight.config))
    changed = compose(words)
    assert changed.parallelism.kind == "fsdp" and compose(runs[0].overrides).parallelism.kind == "single"
    assert folder.endswith(runs[1].run_id)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher.gpus_per_node=some"], "launcher.gpus_per_node must be a number, 0 for none, or auto; got some"),
        (["launcher.gpus_per_node=-1"], "launcher.gpus_per_node must be a number, 0 for none, or auto; got -1"),
        (["launcher.gpus_per_node=auto", "launcher.nodes=2"], "chooses the nodes too; leave out launcher.nodes"),
        (["launcher.time_margin=0.5"], "launcher.time_margin must be at least 1; got 0.5"),
    ],
)
def test_a_wrong_key_of_a_size_is_named(words, said):
    with pytest.raises(ConfigError) as error:
        fill(SlurmConfig, CONFIG_DIR / "launcher" / "slurm.yaml", "launcher", words)
    assert said in str(error.value)


def test_a_file_and_a_word_give_the_same_number_of_gpus(tmp_path):
    (tmp_path / "mine.yaml").write_text("gpus_per_node: 4\ntime: auto\ntime_margin: 2\n")
    config = fill(SlurmConfig, tmp_path / "mine.yaml", "launcher", [])
    assert (config.gpus_per_node, config.processes, config.time_margin) == (4, 4, 2.0) and config.has_auto_time
    assert fill(SlurmConfig, tmp_path / "mine.yaml", "launcher", ["launcher.gpus_per_node=8"]).processes == 8


def test_a_dry_run_shows_each_size_and_where_its_script_differs(door, monkeypatch):
    monkeypatch.setattr(slurm, "has_slurm", lambda: False)
    words = ("launcher.time=auto", "model=bigram,nano_l", "--flops-per-second", "3e5")
    status, out, err = door("submit", "--dry-run", *words)
    assert (status, err) == (0, "")
    assert re.search(r"^1 +2 +bigram ", out, re.MULTILINE) and re.search(r"^2 +2 +nano_l ", out, re.MULTILINE)
    assert "4 tasks, each on 1 GPU, in 2 array jobs" in out
    limits = re.findall(r"#SBATCH --time=(.*)", out)
    assert len(limits) == 2 and seconds_of(limits[0]) < seconds_of(limits[1])
    assert "# array job 2 of 2: the same script with\n#SBATCH --time=" in out and out.count("#SBATCH --array") == 1


# ---- On a real cluster


@pytest.mark.slurm
def test_two_sizes_are_two_array_jobs_with_their_own_limits(cluster, door, states):
    words = ("launcher.time=auto", "--flops-per-second", "3e5", "launcher.cpus_per_process=4")
    status, out, err = door("submit", *words, "model=bigram,nano_l")
    assert (status, err) == (0, "") and out.count(": 2 tasks, script and output in") == 2
    jobs = re.findall(r"^job (\d+):", out, re.MULTILINE)
    answer = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%F %l"], capture_output=True, text=True).stdout
    limits = dict(line.split(maxsplit=1) for line in answer.splitlines())
    assert len(jobs) == 2 and limits[jobs[0]] != limits[jobs[1]]
    assert "0 to submit" in door("submit", *words, "model=bigram,nano_l")[1]
    until(lambda: {state["state"] for state in states("model=bigram,nano_l").values()} == {"finished"}, 180)
    until(lambda: not squeue(), 30)
    assert Path(next(iter(states("model=bigram,nano_l").values()))["folder"]).exists()


@pytest.mark.slurm
def test_a_limit_above_that_of_a_real_partition_is_refused(cluster, door):
    subprocess.run(["scontrol", "update", "partitionname=hasty", "MaxTime=10"], check=True)
    try:
        status, out, err = door("submit", "launcher.partition=hasty", "launcher.time=1:00:00")
        assert status == 2 and "which is 0:10:00" in err and not squeue()
        words = ("launcher.partition=hasty", "launcher.time=auto", "--flops-per-second", "1e3")
        assert "#SBATCH --time=0:10:00" in door("submit", "--dry-run", *words)[1]
    finally:
        subprocess.run(["scontrol", "update", "partitionname=hasty", "MaxTime=INFINITE"], check=True)
