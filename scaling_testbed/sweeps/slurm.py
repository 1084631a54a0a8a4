"""Submit a sweep as Slurm job arrays, and find its tasks in the queue.

A submission is a folder slurm/NNN/ beside the runs. It holds the script job.sh, the output of the tasks, and tasks.txt
with one line for each array task: folder and overrides of its run, quoted for a shell. The job name is made from the
path of this folder, so squeue alone tells which runs are queued, even if the submitting process was killed before it
knew the job id.
"""

import hashlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling_testbed.config.run import PLANNED_RUN
from scaling_testbed.errors import ConfigError, UserError, check_positive
from scaling_testbed.files import write_text
from scaling_testbed.keys import key
from scaling_testbed.sweeps.plan import PlannedRun, on_gpus, sweep_folder

AUTO = "auto"
DEFAULT_MAX_ARRAY_SIZE = 1001  # Slurm's default, used if no cluster answers


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """The options that `sweep submit` passes to Slurm. null: not passed, so the default of the cluster applies."""

    partition: str | None = key(None, "The partition, sbatch's --partition.")
    account: str | None = key(None, "The account, sbatch's --account.")
    qos: str | None = key(None, "The quality of service, sbatch's --qos.")
    time: str | None = key(
        None,
        "The time limit of a task, as for sbatch: 2:00:00 or 1-00:00:00. auto: launcher.time_margin times the estimate "
        "of a run, and some minutes more, at most the limit of the partition.",
    )
    time_margin: float = key(1.5, "With launcher.time=auto, the factor between the estimate of a run and its limit.")
    constraint: str | None = key(None, "Features that a node must have, sbatch's --constraint.")
    memory: str | None = key(None, "Memory of a node, for example 64G.")
    nodes: int = key(1, "Nodes of one run.")
    gpus_per_node: int | str = key(
        1,
        "GPUs of a node, one process for each. 0: only CPUs. auto: one for each run that fits one, and for another run "
        "the overrides and the GPUs with which it fits.",
    )
    cpus_per_process: int | None = key(None, "CPUs of a process.")
    max_running: int | None = key(
        None,
        "Array tasks that run at a time in each array job. A sweep larger than MaxArraySize has several array jobs.",
    )
    signal_seconds: int = key(
        120, "Seconds before the time limit at which a task saves a checkpoint and goes back into the queue."
    )
    requeue: bool = key(True, "Whether a task goes back into the queue before its time limit or when it is preempted.")
    max_restarts: int = key(100, "How often a task goes back into the queue at most.")
    torchrun: bool = key(False, "Whether torchrun starts the processes instead of srun.")
    sbatch: list[str] = key([], "Further options of sbatch, for example ['--exclude=node7','--mail-type=END'].")
    setup: list[str] = key([], "Shell lines before training, for example ['module load cuda'].")
    python: str | None = key(None, "The Python interpreter of the tasks. null: the one that runs `sweep submit`.")

    def __post_init__(self):
        for name in ("time_margin", "nodes", "cpus_per_process", "max_running", "signal_seconds", "max_restarts"):
            check_positive(f"launcher.{name}", getattr(self, name))
        object.__setattr__(self, "gpus_per_node", _gpus(self.gpus_per_node))
        if self.gpus_per_node == AUTO and self.nodes > 1:
            raise ConfigError("launcher.gpus_per_node=auto chooses the nodes too; leave out launcher.nodes")
        if self.time_margin < 1:
            raise ConfigError(f"launcher.time_margin must be at least 1; got {self.time_margin:g}")
        for option in self.sbatch:
            if not option.startswith("-"):
                raise ConfigError(f"launcher.sbatch holds options of sbatch, such as --exclude=node7; got {option!r}")
        texts = [self.partition, self.account, self.qos, self.time, self.constraint, self.memory, *self.sbatch]
        if bad := [text for text in texts if text and re.search(r"[\x00-\x1f]", text)]:
            raise ConfigError(f"an option of sbatch must be one line; got {bad[0]!r}")
        limit = seconds_of(self.time)
        if self.time and limit is None and self.time.upper() not in (AUTO.upper(), "UNLIMITED", "INFINITE"):
            raise ConfigError(f"launcher.time must be as 2:00:00 or 1-00:00:00, or auto; got {self.time!r}")
        if self.requeue and limit is not None and limit <= self.signal_seconds:
            raise ConfigError(
                f"launcher.time must be longer than launcher.signal_seconds={self.signal_seconds}, which comes before "
                f"its end; got {self.time!r}, {limit} seconds"
            )

    @property
    def gpus(self) -> int:
        """GPUs of a node; for auto the least, which is one."""
        return 1 if isinstance(self.gpus_per_node, str) else self.gpus_per_node

    @property
    def has_auto_gpus(self) -> bool:
        """Whether each run has the GPUs with which it fits."""
        return self.gpus_per_node == AUTO

    @property
    def has_auto_time(self) -> bool:
        """Whether each run has a time limit by its estimate."""
        return self.time == AUTO

    @property
    def processes_per_node(self) -> int:
        return max(1, self.gpus)

    @property
    def processes(self) -> int:
        """The number of processes of one run."""
        return self.nodes * self.processes_per_node


def _gpus(typed: int | str) -> int | str:
    """A number of GPUs, or auto. Raises ConfigError for anything else."""
    if typed == AUTO:
        return AUTO
    if not str(typed).isdecimal():
        raise ConfigError(f"launcher.gpus_per_node must be a number, 0 for none, or auto; got {typed}")
    return int(typed)


def seconds_of(limit: str | None) -> int | None:
    """A time limit as sbatch reads it: m, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None where it is none of these."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if not found:
        return None
    days, *given = (None if part is None else int(part) for part in found.groups())
    parts = [part for part in given if part is not None]
    units = (3600, 60, 1) if days is not None or len(parts) == 3 else (60, 1)
    return 86400 * (days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


@dataclass(frozen=True)
class Submission:
    """One array job: its folder, script, and runs by array index. job_id: None until it is submitted."""

    folder: Path
    script: str
    runs: list[PlannedRun]
    job_id: str | None = None


def generations(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs in groups, so that each run is in a later group than the one in whose state it begins."""
    groups: list[list[PlannedRun]] = []
    left = list(runs)
    while left:
        ids = {run.run_id for run in left}
        groups.append([run for run in left if run.after not in ids])
        left = [run for run in left if run.after in ids]
    return groups


def write_submissions(
    runs: Sequence[PlannedRun], config: SlurmConfig, max_array_size: int, after: Sequence[str] = ()
) -> Iterator[Submission]:
    """Yield scripts and task lists for `runs`, in as many array jobs as the cluster's MaxArraySize requires. Each is
    written only when it is requested, so that no files remain if an earlier job is refused.

    after: the jobs that must have ended before, whether or not their tasks failed. A task whose run cannot begin says
    so in its log."""
    parent = sweep_folder(runs) / "slurm"
    for begin in range(0, len(runs), max_array_size - 1):
        part = list(runs[begin : begin + max_array_size - 1])
        folder = _new_folder(parent)
        script = job_script(folder, part, config, after)
        write_text(folder / "tasks.txt", "".join(task_line(run, config) + "\n" for run in part))
        write_text(folder / "job.sh", script)
        yield Submission(folder, script, part)


def job_script(folder: Path, runs: Sequence[PlannedRun], config: SlurmConfig, after: Sequence[str] = ()) -> str:
    """The text of job.sh: options, set-up, the task's run, and the requeue after a warning of the time limit or
    a preemption. after: as in `write_submissions`."""
    limit = f"%{config.max_running}" if config.max_running else ""
    options = {
        "job-name": job_name(folder),
        "array": f"0-{len(runs) - 1}{limit}",
        "output": f"{str(folder.resolve()).replace('%', '%%')}/%a.log",
        "open-mode": "append",
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "nodes": config.nodes,
        "ntasks-per-node": 1 if config.torchrun else config.processes_per_node,
        "gpus-per-node": config.gpus or None,
        "cpus-per-task": _cpus_per_task(config),
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "time": config.time,
        "constraint": config.constraint,
        "mem": config.memory,
        "signal": f"USR1@{config.signal_seconds}",
    }
    lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    lines += ["--requeue" if config.requeue else "--no-requeue", *map(_quoted_option, config.sbatch)]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {line}" for line in lines),
        here=shlex.quote(os.getcwd()),
        setup="\n".join(map(_setup_line, config.setup)),
        planned=PLANNED_RUN,
        tasks=shlex.quote(str(folder.resolve() / "tasks.txt")),
        command=_command(config),
        requeue=_REQUEUE.replace("MAX_RESTARTS", str(config.max_restarts)) if config.requeue else "",
    )


_SCRIPT = """#!/usr/bin/env bash
{options}
# Each array task is one run of a sweep. The same script continues a run that was stopped.
fail() {{
  printf 'error: %s; nothing was run\n' "$1" >&2
  exit 1
}}
cd {here} || fail "the folder of the submission is gone"
{setup}
eval "task=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {tasks}))" && [[ ${{task[0]}} == /* ]] ||
  fail "there is no task $SLURM_ARRAY_TASK_ID in "{tasks}
folder=${{task[0]}}
overrides=("${{task[@]:1}}")
export {planned}="${{folder##*/}}" # the task refuses to train another run
mkdir -p "$folder" || fail "cannot write $folder"
touch "$folder/started"
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer inherits it
trap : TERM USR1 # the signals are for training; this shell must end after it
{command} "${{overrides[@]}}" >> "$folder/log.txt" 2>&1 &
training=$!
while wait $training; status=$?; kill -0 $training 2> /dev/null; do :; done
{requeue}
exit $status
"""

# The decision depends on what this start has written, and not on an old result. It does not depend on the exit status,
# which a launcher may change. If the signal kills a process before Python can write, srun reports it.
# SIGTERM has several causes. A preemption with a GraceTime leaves the job RUNNING until the grace is over, and Slurm
# does not requeue a job that ends by itself within it. After scancel, and where Slurm requeues the job itself, the job
# is COMPLETING already. So is one whose time limit came while it saved; only its reason tells it from a cancelled one.
# If a run stops twice at the same step of its time limit, the limit is too short for progress, and requeueing would
# never end. A preemption is not the fault of the run, but launcher.max_restarts ends that too.
_REQUEUE = """reason=
[ ! "$folder/result.json" -ot "$folder/started" ] &&
  reason=$(grep -Eo 'stopped by SIG(USR1|TERM)[^"]*' "$folder/result.json")
ended() { [ $status -eq "$1" ] && tail -n 5 "$folder/log.txt" | grep -q "$2"; }
ended 138 'User defined signal 1' && reason="killed by SIGUSR1 before it could save"
ended 143 'Terminated' && reason="killed by SIGTERM before it could save"
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$folder/requeued"
task=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
not_requeued() {
  echo "error: $1; it was not requeued; type the same submit to continue it" | tee -a "$folder/log.txt" >&2
}
if [ -z "$reason" ] || ! scontrol show job "$task" | grep -Eq 'JobState=RUNNING|Reason=TimeLimit'; then
  : # finished, failed or cancelled, or Slurm requeues it
elif [[ $reason == *SIGUSR1* && $reason = "$(cat "$folder/requeued" 2> /dev/null)" ]]; then
  not_requeued "again $reason: launcher.time is too short for a step"
elif [ "${SLURM_RESTART_COUNT:-0}" -ge MAX_RESTARTS ]; then
  not_requeued "$reason: it was started again MAX_RESTARTS times (launcher.max_restarts)"
else
  echo "$reason" > "$folder/requeued"
  scontrol requeue "$task"
fi"""


def _command(config: SlurmConfig) -> str:
    """The command that starts the processes. srun sets the rank of each and forwards signals. After the first process
    has ended, the others have two minutes."""
    python = shlex.quote(config.python or sys.executable)
    if not config.torchrun:
        return f"srun --wait=120 {python} -m scaling_testbed.train"
    rendezvous = '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID"' + (
        ' --rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):'
        '$((20000 + SLURM_JOB_ID % 20000))"'
    )
    return (
        f"srun --wait=120 {python} -m torch.distributed.run --nnodes={config.nodes} "
        f"--nproc-per-node={config.processes_per_node} {rendezvous} "
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m scaling_testbed.train"
    )


def _cpus_per_task(config: SlurmConfig) -> int | None:
    if config.cpus_per_process is None:
        return None
    return config.cpus_per_process * (config.processes_per_node if config.torchrun else 1)


def _setup_line(line: str) -> str:
    """A line of shell, followed by a line that ends the task if it failed."""
    return f"{line}\n(($? == 0)) || fail {shlex.quote(f'launcher.setup failed: {line}')}"


def _quoted_option(option: str) -> str:
    """`--key=some value`, `--key some value` or `-k value` with its value quoted for sbatch."""
    found = re.fullmatch(r"([^=\s]*)(=|\s+|$)(.*)", option.strip())
    assert found is not None, "SlurmConfig refuses an option of several lines"
    key, between, value = found.groups()
    return f"{key}{between}{shlex.quote(value)}" if value else f"{key}{between}"


def task_line(run: PlannedRun, config: SlurmConfig) -> str:
    """The run's folder and overrides, quoted for a shell. Raises ConfigError for what does not fit on one line."""
    words = [str(Path(run.folder).resolve()), *(on_gpus(run.overrides) if config.gpus else run.overrides)]
    if bad := [word for word in words if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", word)]:
        raise ConfigError(f"overrides of a run on Slurm must have no line breaks or control characters; got {bad[0]!r}")
    return shlex.join(words)


def _new_folder(parent: Path) -> Path:
    """Make the first folder of parent/001, 002, ... that does not exist, in one atomic step."""
    number = 1
    while True:
        try:
            (parent / f"{number:03}").mkdir(parents=True)
            return parent / f"{number:03}"
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"cannot write {parent}: {error.strerror}; set runs_dir=") from None


def job_name(folder: Path) -> str:
    """The job name of a submission: the name of the sweep and a hash of the folder's path."""
    sweep = re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.parent.parent.name)
    return f"{sweep}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def submit(submission: Submission) -> Submission:
    """Submit one array job by sbatch. If sbatch refuses, removes the folder of the submission and raises UserError with
    the message of sbatch."""
    script = submission.folder / "job.sh"
    answer = _ask("sbatch", "--parsable", str(script))
    if answer.returncode:
        shutil.rmtree(submission.folder)
        raise UserError(f"sbatch refused the job: {_words(answer)}")
    return Submission(submission.folder, submission.script, submission.runs, answer.stdout.strip().partition(";")[0])


def has_slurm() -> bool:
    """Whether this machine has squeue and sbatch."""
    return shutil.which("squeue") is not None and shutil.which("sbatch") is not None


def max_array_size() -> int:
    """The cluster's MaxArraySize. Raises UserError where the cluster does not answer."""
    answer = _ask("scontrol", "show", "config")
    if answer.returncode:
        raise UserError(f"the Slurm cluster does not answer: {_words(answer)}")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
    return max(2, int(found.group(1))) if found else DEFAULT_MAX_ARRAY_SIZE


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster. seconds: the longest time limit of a job; None: no limit."""

    name: str
    seconds: int | None


def partition(named: str | None) -> Partition | None:
    """The partition that a job with this --partition goes to: of several, that with the shortest limit, and without a
    name that of the cluster. None where the cluster does not say."""
    try:
        answer = _ask("scontrol", "--oneliner", "show", "partition")
    except UserError:
        return None
    asked, found = (named or "").split(","), []
    for line in answer.stdout.splitlines() if not answer.returncode else []:
        about = dict(word.partition("=")[::2] for word in line.split())
        if about.get("PartitionName") in asked or (named is None and about.get("Default") == "YES"):
            found.append(Partition(about["PartitionName"], seconds_of(about.get("MaxTime"))))
    return min(found, key=lambda one: math.inf if one.seconds is None else one.seconds, default=None)


def queued(folder: Path) -> dict[str, tuple[str, str]]:
    """Run folder -> (job id, state) of the queued tasks of all submissions in the sweep's `folder`. States are those of
    squeue, in lower case. Raises UserError if the queue cannot be read."""
    submissions = {job_name(path): path for path in (folder / "slurm").glob("[0-9]*")}
    if not submissions:
        return {}
    answer = _ask("squeue", "--noheader", "--array", f"--name={','.join(submissions)}", "--format=%j|%F|%K|%T")
    if answer.returncode:
        raise UserError(f"squeue does not answer: {_words(answer)}")
    found = {}
    for line in answer.stdout.splitlines():
        name, job, index, state = line.rsplit("|", 3)
        if name in submissions and index.isdigit() and state not in _ENDED:
            run_folder = _task_folder(submissions[name], int(index))
            if run_folder:
                found[run_folder] = (f"{job}_{index}", state.lower())
    return found


# States of tasks that squeue may still show although they will not run.
_ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def _task_folder(submission: Path, index: int) -> str | None:
    try:
        return shlex.split((submission / "tasks.txt").read_text().splitlines()[index])[0]
    except (OSError, IndexError, ValueError):
        return None


def _ask(*command: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine; submit on a machine with Slurm, or print the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} gave no answer in two minutes") from None


def _words(answer: subprocess.CompletedProcess) -> str:
    return " ".join((answer.stderr or answer.stdout).split()) or f"status {answer.returncode}"
