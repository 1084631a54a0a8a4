"""Make a command line from typed functions. All commands but train and prepare pass through this module."""

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from scaling_testbed.commands import spellings
from scaling_testbed.commands.doors import errors_reported
from scaling_testbed.errors import ConfigError
from scaling_testbed.plugins import load_plugins

HELP = {"help_option_names": ["-h", "--help"]}
Plugins = Annotated[
    Sequence[str],
    typer.Option(
        "--plugins", metavar="NAME_OR_PATH",
        help="a plug-in to load: the dotted name of a module, or a .py file; repeatable",
    ),
]  # fmt: skip
Verb = Callable[..., int | None]  # prints its result; returns an exit status, None for 0


class _Verb(TyperCommand):
    """A command that also accepts the old spellings of its options."""

    def parse_args(self, ctx, args):
        known = {option for parameter in self.params for option in parameter.opts}
        return super().parse_args(ctx, spellings.today(args, known))


class _Whole(TyperCommand):
    """A command that reads all of its arguments by itself, including options."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, ["--", *args])


class _Verbs(TyperGroup):
    """A group of commands; one of them must be given."""

    def parse_args(self, ctx, args):
        if not args and not ctx.resilient_parsing:
            raise ConfigError(f"give a command: one of {', '.join(self.commands)}; --help explains them")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
        args = [args[0].replace("-", "_"), *args[1:]] if args[0].replace("-", "_") in self.commands else args
        if args[0] not in self.commands and not ctx.resilient_parsing:
            close = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(self.commands)}"
            raise ConfigError(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


def application(
    help_: str,
    verbs: Iterable[Verb] = (),
    groups: Mapping[str, typer.Typer] | None = None,
    *,
    plugins: bool = False,
    completion: bool = False,
) -> typer.Typer:
    """A command line of functions.

    Each function is a command of the same name (list_ for list), with its docstring as the help. Help and errors are
    plain text. groups: subcommands, by name. plugins: whether every command takes --plugins. completion: whether there
    is --install-completion.
    """
    app = typer.Typer(
        cls=_Verbs, help=help_, context_settings=HELP, rich_markup_mode=None, pretty_exceptions_enable=False,
        add_completion=completion,
    )  # fmt: skip
    for verb in verbs:
        add_verb(app, verb, plugins=plugins)
    for name, group in (groups or {}).items():
        app.add_typer(group, name=name)
    return app


def add_verb(app: typer.Typer, verb: Verb, *, plugins: bool = False) -> None:
    """Add a function as a command. plugins: whether it also takes --plugins."""
    app.command(verb.__name__.rstrip("_"), cls=_Verb, context_settings=HELP)(_called(verb, plugins))


def add_door(app: typer.Typer, name: str, help_: str, door: Callable[[list[str]], int]) -> None:
    """Add a command that passes all its arguments to `door`, the main function of another command line."""

    def call(words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None) -> int:
        return door(words or [])

    app.command(name, cls=_Whole, help=help_, add_help_option=False)(call)


def _called(verb: Verb, plugins: bool) -> Verb:
    """The function that typer calls for a command. plugins: whether it takes --plugins and loads them first."""

    @functools.wraps(verb)
    def call(**typed: Any) -> int:
        load_plugins(typed.pop("plugins", ()))
        return verb(**typed) or 0

    given = inspect.signature(verb, eval_str=True)
    parameters = list(given.parameters.values())
    if plugins:
        parameters.append(inspect.Parameter("plugins", inspect.Parameter.KEYWORD_ONLY, default=(), annotation=Plugins))
    parameters = [one.replace(annotation=_for_typer(one.annotation)) for one in parameters]
    call.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect
    call.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": given.return_annotation}
    return call


def _for_typer(annotation: Any) -> Any:
    """The annotation with list in place of Sequence: typer accepts only list for a repeatable option."""
    kind, *told = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else [annotation]
    if typing.get_origin(kind) is not Sequence:
        return annotation
    return Annotated[list[typing.get_args(kind)[0]], *told]  # type: ignore[misc]  # made at run time


def run(app: typer.Typer, argv: Sequence[str], name: str) -> int:
    """Run the command line `name` with `argv` and return the exit status. An error is one line on stderr."""
    with errors_reported() as found:
        for place, word in enumerate(argv):
            if not word.strip():  # as a path, it would be the current folder
                after = f" after {argv[place - 1]}" if place else ""
                raise ConfigError(f"the argument{after} is blank; is a variable of the shell not set?")
        command = typer.main.get_command(app)
        try:
            with command.make_context(name, list(argv)) as context:
                found.status = command.invoke(context)
        except typer.Exit as exit_:  # --help was printed
            found.status = exit_.exit_code
        except typer.TyperException as error:
            raise ConfigError(_in_one_line(error)) from None
    return found.status


def _in_one_line(error: typer.TyperException) -> str:
    """The error in the arguments of a command, as one line with the name of the command."""
    context = getattr(error, "ctx", None)
    verb = f"{context.info_name}: " if context else ""
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):  # an unknown option
        close = difflib.get_close_matches(option, sorted(error.possibilities or ()), n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the options"
        return f"{verb}there is no option {option}; {hint}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{verb}{said[0].lower()}{said[1:]}; --help explains the arguments"
