"""What all doors share: exit statuses, errors in one line, and the way from arguments to a run."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from scaling_testbed.errors import DONE, INTERRUPTED, PIPE_CLOSED, ConfigError, UserError
from scaling_testbed.processes.world import is_main_process

if TYPE_CHECKING:
    from scaling_testbed.config.run import RunConfig


class Exit:
    """How a command ended: 0 unless its body or an error says otherwise."""

    status: int = DONE


@contextlib.contextmanager
def errors_reported() -> Iterator[Exit]:
    """Around what a door does: an error that a person can mend is printed as its message, and gives the exit status.

    Of several processes, rank 0 prints what they have in common: a wrong key or value, and what they told each other.
    A context manager, so that no frame of it lies between the door and what it calls.
    """
    found = Exit()
    try:
        yield found
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of `... | head` has seen enough; but what was to be done may not be done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        found.status = PIPE_CLOSED
    except UserError as error:
        shared = error.told_to_all or isinstance(error, ConfigError)
        if is_main_process() or not shared:
            print(f"error: {error}", file=sys.stderr)
        found.status = error.exit_status
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where it was", file=sys.stderr)
        found.status = INTERRUPTED


def run_door(command: "Callable[[RunConfig], int]", argv: Sequence[str], doc: str) -> int:
    """What a door does with its arguments: compose, call `command`, return the exit status.

    Plain overrides are composed here, so that a mistake costs one line on stderr instead of a traceback. Hydra's own
    options (--cfg job, --info, --multirun ...) are left to Hydra. `doc` is the door's docstring, for --help.
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
    """The door's help; or where words are typed beside --help, what these sections and keys mean."""
    from scaling_testbed.config.compose import outside_of, run_config_files
    from scaling_testbed.config.explain import help_on
    from scaling_testbed.config.search import config_folder
    from scaling_testbed.plugins import load_plugins

    plugins, folders, others = outside_of([argument for argument in argv if "=" in argument])
    if topics := [argument for argument in argv if "=" not in argument and not argument.startswith("-")]:
        load_plugins(plugins)  # their kinds have keys too
        return help_on(topics)
    configs = [config_folder(folder) for folder in folders]
    groups: dict[str, list[str]] = {}
    for path in run_config_files(configs):
        groups.setdefault(path.parent.name, []).append(path.stem)
    choices = "\n".join(f"  {group}={' | '.join(names)}" for group, names in groups.items())
    more = "--help SECTION_OR_KEY explains keys, such as --help optimizer or --help optimizer.lr"
    options = "Options of Hydra: --cfg job, --info, --multirun, --hydra-help"
    return f"{doc.strip()}\n\nChoices:\n{choices}\n\n{more}\n{options}"
