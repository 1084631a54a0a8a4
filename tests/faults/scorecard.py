"""The scorecard: `make faults` loads this plugin of pytest, which prints a line for each fault after the tests.

A test has the mark `fault(name, promise)`, and tells what it saw by `record_property("seen", text)`. Several tests may
carry one name: the line then shows the worst of their verdicts, and their seconds together.
"""

import re
from dataclasses import dataclass, field

import pytest

# Every fault that needs a test: the rows of the matrix, and what was found wrong. Names that begin with C are added.
MATRIX = tuple(str(number) for number in range(1, 43))
NAMES = (*MATRIX, *(f"A{number}" for number in range(1, 20)), *(f"B{number}" for number in range(1, 10)))
HOLDS, LEFT_OUT, NO_TEST, FAILS = "holds", "left out", "no test", "FAILS"  # from the best to the worst
WORSE = (HOLDS, LEFT_OUT, NO_TEST, FAILS)
PROMISE, SEEN = 60, 60  # characters of a line


@dataclass
class Line:
    """One fault. seen: what its tests told, each once. reasons: of tests that were left out."""

    promise: str = ""
    seen: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The worst one. A fault that is held by some tests, and whose others were left out, holds in part."""
        worst = max(self.verdicts, key=WORSE.index, default=NO_TEST)
        return "in part" if worst == LEFT_OUT and HOLDS in self.verdicts else worst


def faults_of(item: pytest.Item) -> list[tuple[str, str]]:
    """Name and promise of each fault that a test provokes."""
    return [(str(mark.args[0]), mark.args[1]) for mark in item.iter_markers("fault")]


def order(name: str) -> tuple:
    """1 to 42, A1 to A19, B1 to B9, then C by its text."""
    letter, number = re.match(r"([A-Z]?)(\d*)", name).groups()
    return letter, int(number or 0), name


def pytest_itemcollected(item: pytest.Item) -> None:
    """Reports carry user_properties, also those of other processes; marks they do not."""
    item.user_properties += [("fault", fault) for fault in faults_of(item)]


class Scorecard:
    """The lines by fault, filled from the reports of the tests."""

    def __init__(self):
        self.lines: dict[str, Line] = {name: Line() for name in NAMES}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for fault, promise in [value for key, value in report.user_properties if key == "fault"]:
            line = self.lines.setdefault(fault, Line())
            line.promise = line.promise or promise
            line.seconds += report.duration
            if report.when == "call" or report.outcome != "passed":
                self._judge(line, report)

    def _judge(self, line: Line, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail"):
            line.verdicts.append(FAILS)
            line.seen.append(f"expected to fail {report.wasxfail}".strip())
            return
        if report.outcome == "skipped":
            line.verdicts.append(LEFT_OUT)
            line.reasons.append(str(report.longrepr[-1]).removeprefix("Skipped: "))
            return
        line.verdicts.append(HOLDS if report.outcome == "passed" else FAILS)
        if report.outcome == "failed":
            line.seen.append(f"in {report.nodeid.rpartition('::')[2]}: {brief(report)}")
            return
        told = [str(value) for key, value in report.user_properties if key == "seen"]
        line.seen += [text for text in told or [sentence(report.nodeid)] if text not in line.seen]

    def pytest_terminal_summary(self, terminalreporter) -> None:
        write = terminalreporter.write_line
        widths = (max(map(len, self.lines)), PROMISE, SEEN)
        write("")
        write(row(widths, "fault", "promise", "seen", "verdict", "seconds"))
        for name in sorted(self.lines, key=order):
            line = self.lines[name]
            seen = line.seen or line.reasons
            more = f" (and {len(seen) - 1} more)" if len(seen) > 1 else ""
            told = (seen[0] if seen else "") + more
            write(row(widths, name, line.promise, told, line.verdict, f"{line.seconds:.1f}"))
        write("")
        for reason in dict.fromkeys(text for line in self.lines.values() for text in line.reasons):
            write(f"left out: {reason}")
        write(self.summary())

    def summary(self) -> str:
        """How many faults of each kind hold."""
        parts = []
        for kind, names in (("", MATRIX), ("A ", self._named("A")), ("B ", self._named("B"))):
            parts.append(f"{kind}{self._held(names)} of {len(names)}")
        parts.append(f"C {self._held(self._named('C'))} of {len(self._named('C'))}")
        return ", ".join(parts)

    def _named(self, letter: str) -> list[str]:
        return [name for name in self.lines if name.startswith(letter)]

    def _held(self, names) -> int:
        return sum(self.lines[name].verdict in (HOLDS, "in part") for name in names)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A fault that does not hold, or has no test, makes the exit status 1. What was left out does not."""
        if session.exitstatus == 0 and any(line.verdict in (FAILS, NO_TEST) for line in self.lines.values()):
            session.exitstatus = 1


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Scorecard(), "faults")


def sentence(nodeid: str) -> str:
    """The name of a test as a sentence."""
    name = re.sub(r"\[.*", "", nodeid.rpartition("::")[2])
    return name.removeprefix("test_").replace("_", " ")


def brief(report: pytest.TestReport) -> str:
    """The last line of what failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().split("\n")[0]


def row(widths: tuple[int, ...], *cells: str) -> str:
    """One line of the table. Long cells are cut."""
    shown = [one_line(cell)[:width].ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return " ".join([*shown, cells[3].ljust(8), cells[4].rjust(7)]).rstrip()


def one_line(text: str) -> str:
    return " ".join(text.split())
