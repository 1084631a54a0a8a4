"""Functions of all entry points: exit statuses, errors in one line, and the steps from arguments to a run."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from scaling_testbed.errors import (
    DONE,
    FAILED,
    INTERRUPTED,
    PIPE_CLOSED,
    ConfigError,
    UserError,
    bytes_asked_for,
    is_memory_error,
)
from scaling_testbed.files import CANNOT_WRITE, reason_of
from scaling_testbed.processes.interrupts import INTERRUPTED_LINE, Interrupted, raised
from scaling_testbed.processes.world import is_main_process
from scaling_testbed.progress import open_streams, release_streams, say

if TYPE_CHECKING:
    from scaling_testbed.config.run import RunConfig


VERBOSE = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}


def without_verbosity(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without -q and -v, and what these ask for, as progress.verbosity takes it. Raises ConfigError for
    both."""
    asked = {VERBOSE[word] for word in argv if word in VERBOSE}
    if len(asked) > 1:
        raise ConfigError("give -q or -v, not both")
    return [word for word in argv if word not in VERBOSE], asked.pop() if asked else None


class Exit:
    """The exit status of a command: 0 unless its body or an error sets another one."""

    status: int = DONE


@contextlib.contextmanager
def errors_reported(*, of_ranks: bool = False) -> Iterator[Exit]:
    """A context that prints the message of a user error and sets the exit status of the command.

    of_ranks: whether the command is one of the processes of a run, if the environment says so. Then only rank 0 prints
    errors that all of them have: a wrong key or value, and errors that they shared. This is a context manager so that
    it adds no stack frame between an entry point and the functions it calls.
    """
    found = Exit()
    open_streams()
    try:
        with raised():
            yield found
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. `... | head`, closed the pipe; the command may not have finished
        found.status = PIPE_CLOSED
    except UserError as error:
        shared = of_ranks and (error.told_to_all or isinstance(error, ConfigError))
        if is_main_process() or not shared:
            say(f"error: {error}", errors=True)
        found.status = error.exit_status
    except Interrupted as signal:
        say(f"error: stopped by {signal}; type the same command to continue", errors=True)
        found.status = signal.exit_status
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if is_memory_error(error):
            asked = bytes_asked_for(error)
            more = f": {asked:,} bytes more were asked for" if asked else ""
            say(f"error: there is too little memory here{more}", errors=True)
        elif isinstance(error, OSError) and error.filename is None and error.errno in CANNOT_WRITE:
            say(f"error: the output cannot be written: {reason_of(error)}", errors=True)
        else:
            raise
        found.status = FAILED
    except KeyboardInterrupt:
        say(INTERRUPTED_LINE, errors=True)
        found.status = INTERRUPTED
    finally:
        release_streams()


def run_door(command: "Callable[[RunConfig], int]", argv: Sequence[str], doc: str) -> int:
    """Compose a run from arguments, call `command` with it, and return the exit status.

    Plain overrides are composed here, so that an error is one line on stderr instead of a traceback. Hydra handles its
    own options (--cfg job, --info, --multirun ...). doc: the docstring of the entry point, for --help.
    """
    if {"-h", "--help"} & set(argv):
        with errors_reported() as found:
            print(_help(doc, argv))
        return found.status
    from scaling_testbed.config.compose import compose, through_hydra

    def through(make: "Callable[[], RunConfig]") -> int:
        with errors_reported() as found:
            found.status = command(make())
        return found.status

    with errors_reported() as found:
        own = any(argument.startswith("-") for argument in argv)
        found.status = through_hydra(through, argv) if own else command(compose(argv))
    return found.status


def _help(doc: str, argv: Sequence[str]) -> str:
    """The help of an entry point, or of the sections and keys that are typed beside --help."""
    from scaling_testbed.config.compose import outside_of, run_config_files
    from scaling_testbed.config.explain import help_on
    from scaling_testbed.config.search import config_folder
    from scaling_testbed.plugins import load_plugins
    from scaling_testbed.sweeps.slurm import SlurmConfig

    plugins, folders, _ = outside_of([argument for argument in argv if "=" in argument])
    topics = [argument for argument in argv if "=" not in argument and not argument.startswith("-")]
    configs = [config_folder(folder) for folder in folders]
    groups: dict[str, list[str]] = {}
    for path in run_config_files(configs):
        groups.setdefault(path.parent.name, []).append(path.stem)
    if topics:
        load_plugins(plugins)  # plug-ins add keys
        names = " | ".join(groups["experiment"])
        presets = f"experiment={names}\n  Each sets keys of several sections; --cfg job shows them."
        return "\n\n".join(
            presets if topic == "experiment" else help_on([topic], {"launcher": {"": SlurmConfig}}) for topic in topics
        )
    choices = "\n".join(f"  {group}={' | '.join(names)}" for group, names in groups.items())
    more = "--help SECTION_OR_KEY explains keys, such as --help optimizer or --help optimizer.lr"
    options = "Options of Hydra: --cfg job, --info, --multirun, --hydra-help"
    return f"{doc.strip()}\n\nChoices:\n{choices}\n\n{more}\n{options}"
