"""From typed functions to a command line: the one place that all commands of analyze, sweep and export pass through."""

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
        help="a module that registers what is named, by its dotted name or as a .py file; repeatable",
    ),
]  # fmt: skip
Verb = Callable[..., int | None]  # prints what it found; returns an exit status, None for 0


class _Verb(TyperCommand):
    """A verb that still knows the old spellings of what it takes."""

    def parse_args(self, ctx, args):
        known = {option for parameter in self.params for option in parameter.opts}
        return super().parse_args(ctx, spellings.today(args, known))


class _Whole(TyperCommand):
    """A verb that reads its own arguments, options too."""

    def parse_args(self, ctx, args):
        return super().parse_args(ctx, ["--", *args])


class _Verbs(TyperGroup):
    """Verbs, of which one must be said."""

    def parse_args(self, ctx, args):
        if not args and not ctx.resilient_parsing:
            raise ConfigError(f"say one of {', '.join(self.commands)} first; --help explains them")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
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
    """A command line of functions, each a verb under its own name (list_ for list) with its docstring as its help; help
    and errors are plain text. groups: command lines under one more word. plugins: every verb takes --plugins.
    completion: with --install-completion."""
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
    """Add a function as a verb. plugins: it takes --plugins too."""
    app.command(verb.__name__.rstrip("_"), cls=_Verb, context_settings=HELP)(_called(verb, plugins))


def add_door(app: typer.Typer, name: str, help_: str, door: Callable[[list[str]], int]) -> None:
    """Add a verb that hands all that is typed behind it to `door`, the main of another command line."""

    def call(words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None) -> int:
        return door(words or [])

    app.command(name, cls=_Whole, help=help_, add_help_option=False)(call)


def _called(verb: Verb, plugins: bool) -> Verb:
    """What typer calls with what was typed: every verb passes here. plugins: what --plugins names is loaded first."""

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
    """With list in place of Sequence: typer accepts no other sequence for an option that can be repeated."""
    kind, *told = typing.get_args(annotation) if typing.get_origin(annotation) is Annotated else [annotation]
    if typing.get_origin(kind) is not Sequence:
        return annotation
    return Annotated[list[typing.get_args(kind)[0]], *told]  # type: ignore[misc]  # made at run time


def run(app: typer.Typer, argv: Sequence[str], name: str) -> int:
    """Do what was typed behind `name`; returns the exit status. Mistakes are one line on stderr."""
    with errors_reported() as found:
        command = typer.main.get_command(app)
        try:
            with command.make_context(name, list(argv)) as context:
                found.status = command.invoke(context)
        except typer.Exit as exit_:  # it has helped
            found.status = exit_.exit_code
        except typer.TyperException as error:
            raise ConfigError(_in_one_line(error)) from None
    return found.status


def _in_one_line(error: typer.TyperException) -> str:
    """What is wrong with the arguments of which verb."""
    context = getattr(error, "ctx", None)
    verb = f"{context.info_name}: " if context else ""
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):  # an option that is none
        close = difflib.get_close_matches(option, sorted(error.possibilities or ()), n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
        return f"{verb}there is no option {option}; {hint}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{verb}{said[0].lower()}{said[1:]}; --help explains what is taken"
