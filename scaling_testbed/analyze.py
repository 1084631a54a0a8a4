"""Sensitivities, laws, reports, checkpoints, task scores.

python -m scaling_testbed.analyze VERB PATH [options]
"""

import sys

if __name__ == "__main__":  # before the imports that take time
    from scaling_testbed.processes.interrupts import end_quietly

    end_quietly()

from scaling_testbed.commands.app import application, run
from scaling_testbed.commands.batch import critical_batch
from scaling_testbed.commands.curves import decide, instability, lr_sensitivity
from scaling_testbed.commands.documents import score_documents, select_documents
from scaling_testbed.commands.exposure import exposure
from scaling_testbed.commands.frontier import frontier, ladder
from scaling_testbed.commands.in_context import in_context
from scaling_testbed.commands.items import margins, pass_at
from scaling_testbed.commands.laws import allocate, downstream, fit, laws, list_, predict
from scaling_testbed.commands.next_runs import next_
from scaling_testbed.commands.optima import optima
from scaling_testbed.commands.probe import probe
from scaling_testbed.commands.report import report
from scaling_testbed.commands.targets import prepare_targets
from scaling_testbed.commands.tasks import compare, curvature, inspect, score, tasks
from scaling_testbed.commands.trajectories import anneal

app = application(
    __doc__,
    [
        *(lr_sensitivity, instability, decide, report),
        *(inspect, curvature, score, compare, pass_at, margins, probe, exposure, in_context),
        *(tasks, score_documents, select_documents, prepare_targets),
        *(fit, laws, predict, allocate, next_, downstream, frontier, ladder, optima, anneal, critical_batch),
    ],
    {"law": application("The laws that can be fitted.", [list_], plugins=True)},
    plugins=True,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit status."""
    return run(app, sys.argv[1:] if argv is None else argv, "scaling-testbed analyze")


if __name__ == "__main__":
    sys.exit(main())
