"""Array jobs: what is asked of Slurm, and, on a real cluster (mark slurm), that nothing is lost or done twice."""

import json
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from scaling_testbed import sweep
from scaling_testbed.config.compose import CONFIG_DIR, compose, fill
from scaling_testbed.config.run import PLANNED_RUN
from scaling_testbed.errors import ConfigError
from scaling_testbed.sweeps import slurm
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import on_gpus, plan
from scaling_testbed.sweeps.slurm import SlurmConfig, job_script, task_line, write_submissions
from tests.sweeps.cluster import squeue, until

NASTY = "a b's $(touch x) 100%A"


@pytest.fixture
def runs(tmp_path):
    return plan(narrowed(load_sweep("nano_lr"), [f"runs_dir={tmp_path}/runs"]))[0]


def launcher(*overrides):
    return fill(SlurmConfig, CONFIG_DIR / "launcher" / "slurm.yaml", "launcher", overrides)


def test_the_script_asks_for_what_was_configured(runs, tmp_path):
    config = launcher(
        *("launcher.partition=gpu", "launcher.time=2:00:00", "launcher.max_running=4", "launcher.gpus_per_node=8"),
        *("launcher.signal_seconds=300", "launcher.sbatch=['--comment=a b']", "launcher.setup=['module load x']"),
    )
    script = job_script(tmp_path / "001", runs, config)
    for option in (
        *("array=0-15%4", "partition=gpu", "time=2:00:00", "ntasks-per-node=8", "gpus-per-node=8", "comment='a b'"),
        *("signal=USR1@300", "open-mode=append"),
    ):
        assert f"#SBATCH --{option}\n" in script
    assert f'\nexport {PLANNED_RUN}="${{folder##*/}}" #' in script
    assert "\nmodule load x\n" in script and "--account" not in script
    assert "srun --wait=120" in script and "torch.distributed.run" not in script
    assert "torch.distributed.run --nnodes=1 --nproc-per-node=8" in job_script(
        tmp_path / "001", runs, launcher("launcher.torchrun=true", "launcher.gpus_per_node=8")
    )
    assert "--gpus-per-node" not in job_script(tmp_path / "001", runs, launcher("launcher.gpus_per_node=0"))
    assert "scontrol requeue" not in job_script(tmp_path / "001", runs, launcher("launcher.requeue=false"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.fault("38", "Names and values arrive in a job script as they were written, and run nothing.")
def test_everything_a_person_names_arrives_as_it_was_written(tmp_path, monkeypatch):
    """The script itself, with srun standing for a program that prints its arguments."""
    (tmp_path / NASTY).mkdir()
    quoted = NASTY.replace("'", "\\'")
    runs = plan(narrowed(load_sweep("nano_lr"), [f"runs_dir='{tmp_path / quoted}'", "model=nano_s"]))[0]
    (submission,) = write_submissions(runs, SlurmConfig(python="/a python"), 1001)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(
        "#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
        "import os; print(json.dumps(os.environ['SRUN_CPUS_PER_TASK']))\n"
    )
    (tmp_path / "bin" / "srun").chmod(0o755)
    environment = {"SLURM_ARRAY_TASK_ID": "3", "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "1"}
    environment["SLURM_CPUS_PER_TASK"] = "3"
    subprocess.run(["bash", submission.folder / "job.sh"], env=environment, check=True, cwd=tmp_path)
    printed, cpus = map(json.loads, (Path(runs[3].folder) / "log.txt").read_text().splitlines())
    assert cpus == "3"
    assert printed == ["--wait=120", "/a python", "-m", "scaling_testbed.train", *on_gpus(runs[3].overrides)]
    assert not list(tmp_path.rglob("x")) and not Path("x").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda submission: (submission / "tasks.txt").unlink(), "there is no task 0 in"),
        (lambda submission: (submission / "tasks.txt").write_text("\n"), "there is no task 0 in"),
        (lambda submission: (submission / "tasks.txt").write_text("'/a\n"), "there is no task 0 in"),
        (lambda submission: submission.parents[3].joinpath("here").rmdir(), "the folder of the submission"),
        (None, "launcher.setup failed: cd /nothing; nothing was run"),
    ],
)
def test_a_task_whose_inputs_are_off_runs_nothing_and_says_why(runs, tmp_path, monkeypatch, break_it, message):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    setup = ["false || true # passes", "if true; then", "  :", "fi"] + ([] if break_it else ["cd /nothing", "echo on"])
    (submission,) = write_submissions(runs[:1], SlurmConfig(setup=setup), 1001)
    (tmp_path / "srun").write_text("#!/bin/sh\necho trained\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = f"{tmp_path}:/usr/bin:/bin"

    def run_task():
        environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "1", "PATH": path}
        return subprocess.run(["bash", submission.folder / "job.sh"], env=environment, capture_output=True, text=True)

    log = Path(runs[0].folder) / "log.txt"
    if break_it:
        assert run_task().returncode == 0 and log.read_text() == "trained\n"
        log.unlink()
        break_it(submission.folder)
    ended = run_task()
    assert ended.returncode == 1 and message in ended.stderr and ended.stdout == ""
    assert not log.exists()


def test_what_does_not_fit_on_a_line_of_the_task_list_is_refused(door, tmp_path):
    for flags in ((), ("--dry-run",)):
        status, _, err = door("submit", *flags, 'logging.project="a\nb"')
        assert status == 2 and r"a\nb" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_with_gpus_uses_them_or_fails_unless_it_names_a_device(runs):
    def device(config, run):
        (folder, *overrides) = shlex.split(task_line(run, config))
        return compose(overrides).compute.device

    named = replace(runs[0], overrides=[*runs[0].overrides, "compute.device=cpu"])
    assert device(SlurmConfig(gpus_per_node=2), runs[0]) == "cuda"
    assert device(SlurmConfig(gpus_per_node=2), named) == "cpu"
    assert device(SlurmConfig(gpus_per_node=0), runs[0]) == "auto"


@pytest.mark.fault("41", "A missing or refusing sbatch is one line, and large sweeps become several arrays.")
def test_more_runs_than_an_array_may_have_become_several_jobs(runs):
    submissions = list(write_submissions(runs, SlurmConfig(), max_array_size=7))
    assert [len(submission.runs) for submission in submissions] == [6, 6, 4]
    assert [submission.folder.name for submission in submissions] == ["001", "002", "003"]
    tasks = [line for s in submissions for line in (s.folder / "tasks.txt").read_text().splitlines()]
    assert [shlex.split(line)[0] for line in tasks] == [run.folder for run in runs]
    assert "--array=0-5\n" in submissions[0].script and "--array=0-3\n" in submissions[2].script
    assert len({slurm.job_name(submission.folder) for submission in submissions}) == 3


def test_a_refused_job_leaves_nothing_behind_that_was_not_submitted(door, tmp_path, monkeypatch):
    jobs = []

    def sbatch(*command):
        if command[0] != "sbatch":
            return subprocess.CompletedProcess(command, 0, "", "")
        jobs.append(command[-1])
        refusal = "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
        return subprocess.CompletedProcess(command, len(jobs) - 1, "71;test\n", refusal if len(jobs) > 1 else "")

    monkeypatch.setattr(slurm, "_ask", sbatch)
    monkeypatch.setattr(slurm, "has_slurm", lambda: True)
    monkeypatch.setattr(slurm, "max_array_size", lambda: 3)
    status, out, err = door("submit", "seed=0,1")
    assert status == 1 and "job 71: 2 tasks" in out and "sbatch refused the job: sbatch: error: QOSMax" in err
    assert len(jobs) == 2 and [path.name for path in (tmp_path / "runs/tiny/slurm").iterdir()] == ["001"]


def test_two_submitters_at_once_send_every_run_once(door, tmp_path, monkeypatch):
    """The second comes while the first hands its job over, and waits for it; by then its tasks are in the queue."""
    jobs, in_queue, looks, waiting = [], {}, [], []
    seconds = ThreadPoolExecutor()

    def ask(*command):
        if command[0] == "sbatch":
            if not waiting:
                waiting.append(seconds.submit(sweep.main, arguments))
                until(lambda: len(looks) == 3, 60)  # the second's first
                time.sleep(0.2)
            jobs.append(command[-1])
            lines = (Path(command[-1]).parent / "tasks.txt").read_text().splitlines()
            in_queue.update({shlex.split(line)[0]: (f"7_{index}", "pending") for index, line in enumerate(lines)})
        return subprocess.CompletedProcess(command, 0, "7\n", "")

    monkeypatch.setattr(slurm, "_ask", ask)
    monkeypatch.setattr(slurm, "has_slurm", lambda: True)
    monkeypatch.setattr(slurm, "max_array_size", lambda: 1001)
    monkeypatch.setattr(slurm, "queued", lambda _: looks.append(1) or dict(in_queue))
    places = [f"sweep={tmp_path / 'tiny.yaml'}", f"runs_dir={tmp_path / 'runs'}"]
    arguments = ["submit", *places]
    assert sweep.main(arguments) == 0
    assert waiting[0].result(60) == 0
    assert len(jobs) == 1 and len(in_queue) == 4


def test_only_a_run_that_this_start_saved_and_nobody_cancelled_goes_back_into_the_queue(runs, tmp_path):
    """job: what scontrol says of it. A preempted one is RUNNING within its GraceTime, a cancelled one COMPLETING."""
    (submission,) = write_submissions(runs[:1], SlurmConfig(max_restarts=50), 1001)
    folder = Path(runs[0].folder)
    (tmp_path / "bin").mkdir()

    def requeued(error, after, restarts=0, status=75, said="", job="JobState=RUNNING Reason=None"):
        answer = f'[ $1 = show ] && echo "   {job}" || echo "$@" >> {tmp_path}/requeued'
        (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\n{answer}\n")
        result = f'{{\n "status": "preempted",\n "error": "{error}"\n}}\n'
        body = f"printf '%s' {shlex.quote(result)} > {folder}/result.json" if after else ":"
        (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\n{body}\necho '{said}'\nexit {status}\n")
        for tool in ("srun", "scontrol"):
            (tmp_path / "bin" / tool).chmod(0o755)
        environment = {
            "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_ARRAY_JOB_ID": "8",
            "SLURM_RESTART_COUNT": str(restarts),
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        }
        (tmp_path / "requeued").unlink(missing_ok=True)
        time.sleep(0.02)
        assert subprocess.run(["bash", submission.folder / "job.sh"], env=environment).returncode == status
        return (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else None

    assert requeued("stopped by SIGUSR1 at step 7", True) == "requeue 8_0\n"
    assert requeued("stopped by SIGUSR1 at step 7", False) is None  # an earlier start's result
    cancelled, too_late = "JobState=COMPLETING Reason=None", "JobState=COMPLETING Reason=TimeLimit"
    assert requeued("stopped by SIGTERM at step 7", True) == "requeue 8_0\n"  # preempted
    assert requeued("stopped by SIGTERM at step 7", True, job=cancelled) is None
    assert requeued("stopped by SIGUSR1 at step 7", True, job=cancelled) is None
    assert requeued("stopped by SIGUSR1 at step 7", True, job=too_late) == "requeue 8_0\n"
    assert requeued("stopped by SIGINT at step 7", True) is None
    assert requeued("", False, status=143, said="srun: error: n1: task 0: Terminated") == "requeue 8_0\n"
    assert requeued("stopped by SIGTERM at step 7", True, restarts=1) == "requeue 8_0\n"
    assert requeued("stopped by SIGTERM at step 7", True, restarts=50) is None
    assert "launcher.max_restarts" in (folder / "log.txt").read_text()
    killed = "srun: error: n1: task 0: User defined signal 1"  # before Python could write anything
    assert requeued("", False, status=138, said=killed) == "requeue 8_0\n"
    assert requeued("", False, status=138, said="\n".join("abcde")) is None  # a status alone says too little
    # It goes round as long as it gets on; submitted anew it may try again.
    assert requeued("stopped by SIGUSR1 before training", True, restarts=1) == "requeue 8_0\n"
    assert requeued("stopped by SIGUSR1 at step 7", True, restarts=2) == "requeue 8_0\n"
    assert requeued("stopped by SIGUSR1 at step 8", True, restarts=3) == "requeue 8_0\n"
    assert requeued("stopped by SIGUSR1 at step 8", True, restarts=4) is None
    assert "launcher.time is too short" in (folder / "log.txt").read_text()
    assert requeued("stopped by SIGUSR1 at step 8", True) == "requeue 8_0\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launcher.partion=x", "did you mean launcher.partition"),
        ("launcher.nodes=0", "launcher.nodes must be greater than zero"),
        ("launcher.nodes=x", "launcher.nodes: value 'x' of type 'str' could not be converted to Integer"),
        ("launcher.nodes=null", "launcher.nodes: field 'nodes' is not Optional"),
        ("launcher.requeue=perhaps", "launcher.requeue: value 'perhaps' is not a valid bool"),
        ("launcher.setup=module load x", "launcher.setup must be a list of texts"),
        ("launcher.setup=a,b", "launcher.setup must be a list of texts, such as ['a b','c']; got 'a,b'"),
        ("launcher.setup=[a,1]", "launcher.setup must be a list of texts, such as ['a b','c']; got ['a', 1]"),
        ("launcher.nodes=${x}", "launcher.nodes must be a value and no interpolation; got '${x}'"),
        ("launcher.sbatch=[exclude]", "options of sbatch"),
        ("launcher.time=2", "longer than launcher.signal_seconds=120, which comes before its end; got '2', 120 sec"),
        ("launcher.time=8h", "must be as 2:00:00 or 1-00:00:00, or auto; got '8h'"),
        ("launcher.time=1:59", "119 seconds"),
        ("launcher.time=0:01:59", "119 seconds"),
        ("launcher.time=0-0:1", "60 seconds"),
    ],
)
def test_a_wrong_launcher_key_is_named(override, message):
    with pytest.raises(ConfigError) as error:
        launcher(override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_launcher_values_stay_as_they_are_written(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "time: 8:00:00\naccount: 007\nqos: on\nmemory: 64_0\nconstraint:\nnodes: 2\nrequeue: no\n"
        "setup: ['export X=${SCRATCH}/a', 12]\nsbatch: [--mail-type END]\n"
    )
    config = fill(SlurmConfig, tmp_path / "mine.yaml", "launcher", [])
    assert (config.time, config.account, config.qos, config.memory) == ("8:00:00", "007", "on", "64_0")
    assert (config.constraint, config.nodes, config.requeue) == (None, 2, False)
    assert (config.setup, config.sbatch) == (["export X=${SCRATCH}/a", "12"], ["--mail-type END"])
    typed = launcher(
        *("launcher.partition=gpu,long", "launcher.constraint=a100&nvlink", "launcher.time=1-00", "launcher.qos=null"),
        "launcher.setup=['export X=${SCRATCH}/b','c d']",
    )
    for limit in ("3", "2:01", "0:02:01", "0-0:03", "1-0", "UNLIMITED"):
        assert launcher(f"launcher.time={limit}").time == limit
    assert (typed.partition, typed.constraint, typed.time) == ("gpu,long", "a100&nvlink", "1-00")
    assert launcher("launcher.constraint=[rack1]").constraint == "[rack1]"  # a list to Hydra, a choice to Slurm
    assert (typed.qos, typed.setup) == (None, ["export X=${SCRATCH}/b", "c d"])


def test_an_option_of_sbatch_is_quoted_but_for_its_name(runs, tmp_path):
    options = ["--mail-type END", "-p gpu", "--comment=a b", "--comment c=d e", "--exclusive"]
    script = job_script(tmp_path / "001", runs, SlurmConfig(sbatch=options))
    for line in ("--mail-type END", "-p gpu", "--comment='a b'", "--comment 'c=d e'", "--exclusive"):
        assert f"#SBATCH {line}\n" in script


@pytest.mark.fault("41", "A missing or refusing sbatch is one line, and large sweeps become several arrays.")
def test_without_slurm_the_script_can_be_seen_and_submitting_says_what_is_missing(door, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, _ = door("submit", "--dry-run", "launcher.partition=p")
    assert status == 0 and "4 to submit" in out and "#SBATCH --partition=p" in out
    assert not (tmp_path / "runs").exists()
    status, _, err = door("submit")
    assert status == 1 and "is not on this machine" in err and len(err.strip().splitlines()) == 1


# ---- On a real cluster


@pytest.mark.fault("32", "Runs go on when their driver is killed, and the next driver adopts them.")
@pytest.mark.slurm
def test_an_array_job_on_two_nodes_takes_a_sweep_to_its_end(cluster, door, states):
    status, out, err = door("submit", "launcher.cpus_per_process=4")
    assert (status, err) == (0, "") and "4 tasks" in out
    assert "0 to submit" in door("submit")[1]  # those in the queue are adopted
    until(lambda: {state["state"] for state in states().values()} == {"finished"}, 120)
    until(lambda: not squeue(), 30)
    assert "0 to submit" in door("submit")[1]


def test_a_queue_that_cannot_be_read_stops_a_submission_but_no_look(door, states, tmp_path, monkeypatch):
    (tmp_path / "runs/tiny/slurm/001").mkdir(parents=True)
    refusal = subprocess.CompletedProcess([], 1, "", "slurm_load_jobs error: Unable to contact slurm controller\n")
    monkeypatch.setattr(slurm, "_ask", lambda *_: refusal)
    monkeypatch.setattr(slurm, "has_slurm", lambda: True)
    said = "squeue does not answer: slurm_load_jobs error: Unable to contact"
    status, out, err = door("status")
    assert status == 0 and "4 pending" in out and err.count(f"warning: {said}") == 1
    status, _, err = door("submit")
    assert status == 1 and f"error: {said}" in err
