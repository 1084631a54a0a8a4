"""Grids of runs: `python -m scaling_testbed.sweep VERB sweep=NAME [key=value ...]`

  plan     what the runs are and cost; spends nothing
  run      on this machine: what is finished is skipped, what was killed goes on; a failed run does not stop the others
  submit   as Slurm job arrays (launcher=slurm); what is queued or running is left alone. --dry-run shows the script
  retry    the same as run, or with launcher=slurm as submit, for failed runs too; run and retry --dry-run only count
  status   where each run stands
  collect  all rows, or those of the runs that are typed, into results.jsonl and results.parquet

sweep=          a name from configs/sweep/, or the path of a .yaml file
scale=          one of the file's scales, where it has some: paper (the default), gpu_hour, cpu
workers=1       run: processes at a time;  gpus=0,1 runs_per_gpu=1: on these GPUs instead
launcher=slurm  submit: configs/launcher/slurm.yaml, or the path of a copy; launcher.KEY=VALUE overrides. plan: with
                launcher.nodes and launcher.gpus_per_node, memory on each GPU of a run
flops_per_second=  plan: what GPU-hours are reckoned with; without it what finished runs of the sweep reached
plugins=, configs=  modules (or .py files) and folders of configurations from outside, here or in the sweep file
Any other key=value applies to every run; key=a,b replaces an axis, or makes one. --json: one object per line.
Exit status: 0 done, 1 a run failed, 75 stopped by a signal, 2 a wrong command.
"""

import sys

from scaling_testbed.commands.doors import errors_reported
from scaling_testbed.commands.sweep import execute


def main(argv: list[str] | None = None) -> int:
    """The door's main; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0 if argv else 2
    with errors_reported() as found:
        found.status = execute(argv)
    return found.status


if __name__ == "__main__":
    sys.exit(main())
