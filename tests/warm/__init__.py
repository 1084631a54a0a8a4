"""A Python interpreter whose processes start warm: they are forks of one process that has imported PyTorch and Hydra.

`WarmPython(folder).path` is the file `folder/python`, which tests use in place of `sys.executable`:

1. `client.py` runs as a small process of its own. It sends its arguments, folder, environment and open files to the
   warm parent, passes signals on to the fork, and ends as the fork ends. Where a fork could differ from a new
   interpreter, the client becomes the real interpreter instead (`must_be_real`).
2. `parent.py` is the warm parent. It imports modules and gets ready to compose. It has one thread. It forks a child for
   each request. The child runs the module, the code or the script as a new interpreter does.

A fork sees modules that are loaded already, and ends without taking its modules apart. A test of what a command
imports, or of how Python ends, needs a real interpreter.
"""

import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
from pathlib import Path

from tests.warm.client import read_once

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class WarmPython:
    """The interpreter and its warm parent, until `close`. Outside of Linux the interpreter is the real one."""

    def __init__(self, folder: Path):
        self.path, self.parent = sys.executable, None
        if not sys.platform.startswith("linux"):
            return
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        address = f"scaling-testbed-tests-{secrets.token_hex(8)}"
        known, python = folder / "known.json", folder / "python"
        fixed = {"address": address, "python": sys.executable, "environment": read_once(environment)}
        known.write_text(json.dumps(fixed))
        client = shlex.join([sys.executable, "-IS", str(HERE / "client.py"), str(known)])
        python.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
        python.chmod(0o755)
        self.path = str(python)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0" + address)
            listener.listen(64)  # clients wait until the parent has imported everything
            command = [sys.executable, HERE / "parent.py", str(listener.fileno()), self.path]
            self.parent = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def close(self):
        """Ends the warm parent."""
        if self.parent is not None:
            self.parent.communicate()  # closes its stdin, at which it ends
