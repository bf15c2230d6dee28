"""The checks of `hyperrt doctor` and `hyperrt lora verify`, and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hyperrt.cli.output import Output
from hyperrt.errors import HyperRTError

MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warn" (it works, but look at it) or "fail".
        detail: what was found, one line.
        do: the next step, if any.
        code: exit code of a failure.
    """

    name: str
    status: str
    detail: str
    do: str = ""
    code: int = 0

    def text(self) -> str:
        """One line, and a second one with what to do."""
        line = f"{MARKS[self.status]}  {self.name}: {self.detail}"
        return f"{line}\n      do: {self.do}" if self.do and self.status != "ok" else line


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Run a check; an error that it raises becomes a failure."""
    try:
        return check()
    except HyperRTError as error:
        return Check(name, "fail", f"{error.what}; {error.why}".rstrip("; "), error.do, error.code)


def report(checks: Iterable[Check], output: Output) -> None:
    """Print each check as soon as it is done, and raise if any failed.

    Raises:
        HyperRTError: with the exit code of the first failure.
    """
    done: list[Check] = []
    for check in checks:
        done.append(check)
        fields: dict[str, Any] = asdict(check)
        output.event("check", **fields)
        if not output.json:
            output.result(check.text())
    raise_first(done)
    output.event("result", ok=True, warnings=sum(check.status == "warn" for check in done))


def raise_first(checks: Iterable[Check]) -> None:
    """Raise if a check failed.

    Raises:
        HyperRTError: with the exit code of the first failure.
    """
    failed = [check for check in checks if check.status == "fail"]
    if failed:
        raise _Failed(failed)


class _Failed(HyperRTError):
    def __init__(self, failed: list[Check]) -> None:
        first = failed[0]
        count = "a check" if len(failed) == 1 else f"{len(failed)} checks"
        super().__init__(f"{count} failed", f"{first.name}: {first.detail}", first.do)
        self.code = first.code  # type: ignore[misc]
