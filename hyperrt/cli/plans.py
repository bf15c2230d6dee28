"""The commands `hyperrt plans ...`: list, check and remove the plans in the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hyperrt.cli.output import Output, with_json
from hyperrt.errors import HyperRTError, IntegrityError, UsageError

if TYPE_CHECKING:
    from hyperrt.plans.cache import Plan

HEAD = ("ID", "BACKEND", "VERSION", "TARGET", "GRAPH", "BUNDLE", "MB", "AGE", "LAST USE", "SIZES")
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@click.group(invoke_without_command=True)
@click.pass_context
def plans(context: click.Context, /) -> None:
    """List, check and remove compiled plans, each built for one kind of GPU.

    \b
    Examples:
      hyperrt plans list
      hyperrt plans verify
      hyperrt plans rm 1a2b3c
      hyperrt plans prune --older-than 90 --dry-run

    Plans are executable code. They are in $HYPERRT_HOME/plans, by default ~/.cache/hyperrt/plans.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@plans.command("list")
@with_json
@click.pass_obj
def list_(output: Output) -> None:
    """List the plans: what each is for, its size, age and last use, and the total size.

    \b
    Examples:
      hyperrt plans list
      hyperrt plans list --json
    """
    from hyperrt.plans.cache import Plan, PlanCache

    cache = PlanCache()
    entries = list(cache.entries())
    sound = [plan for _, plan in entries if isinstance(plan, Plan)]
    damaged = [path for path, plan in entries if not isinstance(plan, Plan)]
    if damaged:
        output.warning(f"{_count(len(damaged), 'more plan')} cannot be read; see: hyperrt plans verify")
    if not entries:
        output.note(f"no plans in {cache.folder}; hyperrt compile builds them")
    total = sum(plan.bytes for plan in sound)
    facts = [_facts(plan) for plan in sound]
    output.result(
        f"{_table(sound)}\n{_count(len(sound), 'plan')}, {total / 1e6:.1f} MB" if sound else "",
        folder=str(cache.folder), plans=facts, bytes=total, damaged=list(map(str, damaged)),
    )  # fmt: skip


@plans.command()
@with_json
@click.pass_obj
def verify(output: Output) -> None:
    """Check that every plan still has the hash it was built with, and that only you can write it.

    \b
    Examples:
      hyperrt plans verify
    """
    from hyperrt.plans.cache import PlanCache

    count = 0
    bad: list[tuple[str, HyperRTError]] = []
    for entry, error in PlanCache().verify():
        count += 1
        output.event("plan", **_named(entry), ok=error is None, why=_why(error))
        if not output.json:
            output.result(f"{'FAIL' if error else 'ok  '}  {_line(entry)}{_explained(error)}")
        if error:
            bad.append((_id(entry), error))
    if bad:
        what = f"{_count(len(bad), 'plan')} of {count} cannot be used: {', '.join(id for id, _ in bad[:8])}"
        raise IntegrityError(what, _why(bad[0][1]), bad[0][1].do if len(bad) == 1 else "hyperrt plans prune")
    output.result("" if count else "there are no plans", plans=count)


@plans.command()
@click.argument("ids", metavar="ID...", nargs=-1)
@click.option("--all", "everything", is_flag=True, allow_from_autoenv=False, help="Remove every plan.")
@with_json
@click.pass_obj
def rm(output: Output, ids: tuple[str, ...], everything: bool) -> None:
    """Remove plans by id, or by the beginning of an id.

    \b
    Examples:
      hyperrt plans rm 1a2b3c 4d5e
      hyperrt plans rm --all
    """
    from hyperrt.plans.cache import PlanCache

    if everything == bool(ids):
        what = "ids and --all were given" if ids else "no plan was given"
        raise UsageError(what, "the command takes ids or --all", "hyperrt plans list")
    removed = PlanCache().remove(None if everything else ids)
    lines = [f"removed {_line(entry)}" for entry in removed]
    output.result("\n".join(lines), removed=[_named(entry) for entry in removed])


@plans.command()
@click.option(
    "--older-than", type=click.IntRange(min=0), metavar="DAYS", help="Also remove plans older than this."
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; show what would be removed.")
@with_json
@click.pass_obj
def prune(output: Output, older_than: int | None, dry_run: bool) -> None:
    """Remove plans that are damaged or not of the newest version, and leftovers of killed runs.

    \b
    Examples:
      hyperrt plans prune --dry-run
      hyperrt plans prune --older-than 90
    """
    from hyperrt.plans.cache import PlanCache

    removed = PlanCache().prune(older_than=older_than, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} {_line(entry)}: {why}" for entry, why in removed]
    if not removed:
        output.note("there is nothing to remove")
    output.result(
        "\n".join(lines), removed=[_named(entry) | {"why": why} for entry, why in removed], dry_run=dry_run
    )


def _facts(plan: Plan) -> dict[str, Any]:
    """The facts of a plan, as JSON values; times are Unix seconds."""
    key = plan.key
    return {
        "id": key.id,
        "backend": key.backend,
        "version": key.version,
        "target": key.target,
        "sizes": dict(key.sizes),
        "flags": list(key.flags),
        "graph": plan.graph_name,
        "graph_hash": key.graph,
        "bundle": plan.bundle,
        "bytes": plan.bytes,
        "sha256": plan.sha256,
        "created": plan.created,
        "age_s": max(0.0, time.time() - plan.created),
        "last_use": plan.last_use,
        "weights": len(plan.weights),
        "path": str(plan.path),
    }


def _named(entry: Plan | Path) -> dict[str, Any]:
    """An entry in an event; only its folder if it cannot be read."""
    return {"path": str(entry)} if isinstance(entry, Path) else _facts(entry)


def _id(entry: Plan | Path) -> str:
    from hyperrt.plans.messages import SHOWN

    return (entry if isinstance(entry, Path) else entry.folder).name[:SHOWN]


def _line(entry: Plan | Path) -> str:
    from hyperrt.plans.messages import builder

    if isinstance(entry, Path):
        return str(entry)
    megabytes = f"{entry.bytes / 1e6:.1f} MB"
    return f"{_id(entry)}  {entry.graph_name} of {entry.bundle}, {builder(entry.key)}, {megabytes}"


def _why(error: HyperRTError | None) -> str:
    return "" if error is None else f"{error.what}: {error.why}"


def _explained(error: HyperRTError | None) -> str:
    return "" if error is None else f"\n      {_why(error)}\n      do: {error.do}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(plans: Sequence[Plan]) -> str:
    """The plans as a table, one a line."""
    from hyperrt.plans.messages import sizes

    rows = [HEAD]
    for plan in plans:
        key, used = plan.key, plan.last_use
        rows.append(
            (
                _id(plan), key.backend, key.version, key.target, plan.graph_name, plan.bundle,
                f"{plan.bytes / 1e6:.1f}", _since(plan.created), "never" if used is None else _since(used),
                sizes(key),
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _since(when: float) -> str:
    """How long ago: "3 d", "5 h", "0 min"."""
    seconds = max(0.0, time.time() - when)
    size, unit = next((pair for pair in UNITS if seconds >= pair[0]), UNITS[-1])
    return f"{seconds // size:.0f} {unit}"
