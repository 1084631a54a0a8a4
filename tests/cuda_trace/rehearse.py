"""Run `-m MODULE ARGUMENTS...` or `-c CODE` on the stand-in, as an interpreter would."""

import runpy
import sys

from tests.cuda_trace.stand_in import complete

if __name__ == "__main__":
    complete()
    _, option, what, *arguments = sys.argv
    if option == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
