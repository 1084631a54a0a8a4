"""A Slurm cluster on this machine for the tests: two nodes with four pretend GPUs each, private keys, ports and files.

Needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge) and root. Nothing outside its folder is written.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue")
NODES = ("n1", "n2")

# linuxproc: with pgid, processes that open sessions of their own outlive their job. config_overrides: more processors
# than there are. MinJobAge: squeue keeps showing what has ended. A job in the partition urgent preempts all others.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=600
MaxArraySize=101
GresTypes=gpu
DefMemPerCPU=300
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=hasty Nodes={names} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """What this machine lacks for a cluster, or None."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed"
    return None if os.geteuid() == 0 else "only root can start the daemons"


@contextlib.contextmanager
def running(folder: Path):
    """Start the cluster with its files in `folder`, whose path must be short (it holds a socket), and end it."""
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(1 + len(NODES))
    folder.mkdir(parents=True)
    for path, mode in (("munge", 0o755), ("state", 0o755)):
        (folder / path).mkdir(mode=mode)
    folder.chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for number in range(4):
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))  # as /dev/null
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=8 RealMemory=4000 Gres=gpu:4 State=UNKNOWN"
    nodes = "\n".join(node.format(name, host, port) for name, port in zip(NODES, ports[1:], strict=True))
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, ports=ports, folder=folder, nodes=nodes, names=",".join(NODES)))
    munge = folder / "munge"
    try:
        _start("munged", "--force", f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={folder}/munged.pid",
               f"--log-file={munge}/log", f"--seed-file={munge}/seed")  # fmt: skip
        _start("slurmctld", "-f", str(config))
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            _start("slurmd", "-N", name, "-f", str(config))
        _until_idle(config)
        yield config
    finally:
        for pid_file in sorted(folder.glob("*.pid"), reverse=True):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid_file.read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while list(folder.glob("*.pid")) and time.monotonic() < deadline:  # each removes its own when it ends
            time.sleep(0.1)


def squeue() -> list[str]:
    """A line for each task in the queue, such as "7_0 RUNNING", also of one whose run is done and which is ending."""
    answer = subprocess.run(["squeue", "-h", "-r", "-o", "%i %T"], capture_output=True, text=True)
    return answer.stdout.splitlines()


def until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, squeue() if shutil.which("squeue") else "it never came to this"
        time.sleep(0.5)


def empty_queue() -> None:
    """What a test left in the queue is not the next one's."""
    subprocess.run(["scancel", f"--user={os.getuid()}"], check=True, capture_output=True)
    until(lambda: not squeue(), 60)


def _start(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _until_idle(config: Path) -> None:
    environment = os.environ | {"SLURM_CONF": str(config)}
    for _ in range(120):
        answer = subprocess.run(["sinfo", "-h", "-o", "%D %T"], env=environment, capture_output=True, text=True)
        if answer.stdout.split() == [str(len(NODES)), "idle"]:
            return
        time.sleep(0.25)
    raise RuntimeError(f"the cluster did not start: {answer.stdout}{answer.stderr}")


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
