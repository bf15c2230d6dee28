"""Stores compiled plans in `$HYPERRT_HOME/plans/ID/`, and checks each before it is loaded.

A plan is executable code, so this user builds it and it never comes with a bundle. An entry is published
whole (`hyperrt/files.py`) and read only if nobody else could have written it
(`hyperrt/plans/private_folder.py`): a damaged plan may crash the process, and a forged one may take it over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyperrt import files
from hyperrt.errors import HyperRTError, Incompatible, IntegrityError, NotFound, UsageError
from hyperrt.plans import private_folder
from hyperrt.plans import record as plan_file
from hyperrt.plans.messages import SHOWN, again, builder, compile_command, differing, maker
from hyperrt.plans.record import PlanKey

if TYPE_CHECKING:
    from hyperrt.bundle.manifest import Graph

__all__ = ["Plan", "PlanCache", "PlanKey", "graph_hash"]

USED = "used"  # file of an entry; its time is that of the last use
ATTEMPTS, PAUSE = 40, 0.005  # of a reader while an entry is replaced; the pause is in seconds


@dataclass(frozen=True)
class Plan:
    """An entry of the cache.

    Attributes:
        key: what it was built from and for.
        path: the file of the plan.
        bytes: its size.
        sha256: its hash.
        bundle: name of the graph's bundle.
        graph_name: name of the graph, such as "denoiser".
        created: when it was built, in Unix seconds.
        weights: names of the weights that can be refitted.
    """

    key: PlanKey
    path: Path
    bytes: int
    sha256: str
    bundle: str
    graph_name: str
    created: float
    weights: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Folder of the entry; its name is the id."""
        return self.path.parent

    @property
    def last_use(self) -> float | None:
        """When it was last loaded, in Unix seconds; None if never, or if the cache is read-only."""
        try:
            return (self.folder / USED).lstat().st_mtime
        except OSError:
            return None


Plans = list[Plan]  # inside PlanCache `list` is a method
Entries = list[Plan | Path]
Reasons = list[tuple[Plan | Path, str]]


def graph_hash(graph: Graph) -> str:
    """sha256 (hex) of the hashes of a graph's file and its data file."""
    return hashlib.sha256("\n".join(sha256 for _, sha256 in graph.files()).encode()).hexdigest()


class PlanCache:
    """The plans in a folder, to which other processes may write at the same time.

    Every method that reads raises IntegrityError if other users can write to the folder. The `do` of an
    IntegrityError is a shell command that removes the problem.

    Args:
        folder: None for the folder of this user.

    Raises:
        NotFound: this user has no home folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = private_folder.base_folder() / "plans" if folder is None else Path(folder).absolute()

    def publish(
        self,
        key: PlanKey,
        write: Callable[[Path], object],
        *,
        bundle: str,
        graph_name: str,
        weights: Sequence[str] = (),
    ) -> Plan:
        """Add a plan, or replace the plan of that key.

        Args:
            key: what the plan is built from and for.
            write: writes the plan to the path that it is given.
            bundle: name of the graph's bundle.
            graph_name: name of the graph in it.
            weights: names of the weights that can be refitted.

        Raises:
            IntegrityError: others can write to the cache, or `write` wrote nothing.
            ResourceError: the disk is full or broken.
            UsageError: the cache is not writable.
            Whatever `write` raises; nothing is left behind.
        """
        record = plan_file.Record(
            plan_file.FORMAT, key, 0, "0" * 64, bundle, graph_name, time.time(), tuple(weights)
        )

        def fill(folder: Path) -> None:
            nonlocal record
            write(folder / plan_file.PLAN)
            record = plan_file.finish(folder, record)

        target = self.folder / key.id
        private_folder.make_folder(self.folder)
        with private_folder.open_folder(self.folder) as inside:  # checked before the work, not after it
            self._clear(target, inside)
        files.publish_folder(target, fill, marker=plan_file.RECORD, force=True)
        return _plan(target, record)

    def find(self, key: PlanKey) -> Plan | None:
        """The plan of a key by its record; None if no record can be read. `load` also checks the plan."""
        try:
            return self._read(key.id)
        except IntegrityError:
            return None

    def load(self, key: PlanKey, *, bundle: str = "", graph_name: str = "") -> Plan:
        """The plan of a key, after all checks, including its sha256.

        Args:
            key: the exact key.
            bundle: name of the graph's bundle, for messages and for `nearest`.
            graph_name: name of the graph in it.

        Raises:
            NotFound: no such plan or similar one exists.
            Incompatible: a plan of another version, target or bundle exists.
            IntegrityError: it is damaged, or others could have written it.
        """
        try:
            plan = self._read(key.id, whole=True)
        except IntegrityError as error:
            recorded = self.find(key)
            raise _rebuild(error, key, bundle or (recorded.bundle if recorded else "")) from error
        if plan is None:
            raise self._missing(key, bundle, graph_name)
        with contextlib.suppress(OSError):
            (plan.folder / USED).touch(mode=0o600)
        return plan

    def nearest(self, key: PlanKey, *, bundle: str = "", graph_name: str = "") -> Plan | None:
        """The plan that differs least from a key, among those of the same graph or graph name.

        Without a name: of the same graph, or of another one that was built in the same way.
        """

        def is_near(plan: Plan) -> bool:
            same_way = replace(plan.key, graph=key.graph) == key
            same_name = plan.graph_name == graph_name if graph_name else same_way
            return plan.key != key and (plan.key.graph == key.graph or same_name)

        def rank(plan: Plan) -> tuple[bool, bool, int]:
            same = sum(getattr(plan.key, name) == value for name, value in vars(key).items())
            return plan.key.graph == key.graph, plan.bundle == bundle, same

        return max(filter(is_near, self.list()), key=rank, default=None)

    def entries(self) -> Iterator[tuple[Path, Plan | IntegrityError]]:
        """(folder, plan or error) of every entry, by id; the plans are not checked against their records."""
        for name in self._names():
            try:
                plan = self._read(name)
            except IntegrityError as error:
                yield self.folder / name, error
            else:
                if plan is not None:  # else another process has removed it
                    yield self.folder / name, plan

    def list(self) -> Plans:
        """The plans with a readable record, by id; the plans themselves are not checked."""
        return [plan for _, plan in self.entries() if isinstance(plan, Plan)]

    def verify(self) -> Iterator[tuple[Plan | Path, IntegrityError | None]]:
        """Check every entry: yields the plan, or its folder if the record is not readable, and the error."""
        for path, entry in self.entries():
            if isinstance(entry, Plan):
                yield entry, self._damage(entry)
            else:
                yield path, entry

    def remove(self, ids: Iterable[str] | None) -> Entries:
        """Remove entries, sound or not; looks up all ids before it removes the first.

        Args:
            ids: ids, or unique beginnings of ids; None removes all.

        Raises:
            NotFound: no entry has the id.
            UsageError: several entries match, or the cache is not writable.
        """
        entries = dict(self.entries())
        removed: Entries = []
        for path in entries if ids is None else dict.fromkeys([_only(prefix, entries) for prefix in ids]):
            entry = entries[path]
            _remove(path)
            removed.append(entry if isinstance(entry, Plan) else path)
        return removed

    def prune(self, *, older_than: float | None = None, dry_run: bool = False) -> Reasons:
        """Remove damaged plans, plans of older versions of their backend, and leftovers of killed runs.

        Args:
            older_than: also remove plans built more than this many days ago.
            dry_run: remove nothing.

        Returns:
            (entry, reason) of each that was removed, or would be.
        """
        chosen: Reasons = []
        plans = sorted(self.list(), key=lambda plan: _numbers(plan.key.version))
        newest = {plan.key.backend: plan.key for plan in plans}
        for path, entry in self.entries():
            if not isinstance(entry, Plan):
                chosen.append((path, entry.what))
            elif why := _outdated(entry, newest, older_than):
                chosen.append((entry, why))
            elif damage := self._damage(entry):
                chosen.append((entry, damage.what))
        if not dry_run:
            for item, _ in chosen:
                _remove(item.folder if isinstance(item, Plan) else item)
        leftovers = files.sweep(self.folder, dry_run)
        return chosen + [(path, "left by a run that was killed") for path in leftovers]

    def _names(self) -> Sequence[str]:
        try:
            with private_folder.open_folder(self.folder) as descriptor:
                names = os.listdir(self.folder if descriptor is None else descriptor)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if re.fullmatch("[0-9a-f]{32}", name))

    def _read(self, name: str, whole: bool = False) -> Plan | None:
        """The entry of an id, or None; `whole` also checks the plan itself."""
        path = self.folder / name
        for _ in range(ATTEMPTS):
            try:
                with private_folder.open_folder(self.folder) as folder:
                    try:
                        return _read_entry(path, folder, whole)
                    except IntegrityError as error:
                        do = f"hyperrt plans rm {name[:SHOWN]}"
                        raise IntegrityError(error.what, error.why, do) from error
            except FileNotFoundError:
                if not self._may_return(name):
                    break
                time.sleep(PAUSE)
        return None

    def _may_return(self, name: str) -> bool:
        """Whether a missing entry exists by now, or a writer may be about to publish it."""
        with contextlib.suppress(OSError):
            return any(other == name or other.startswith(files.PREFIX) for other in os.listdir(self.folder))
        return False

    def _damage(self, plan: Plan) -> IntegrityError | None:
        try:
            self._read(plan.folder.name, whole=True)
        except IntegrityError as error:
            return _rebuild(error, plan.key, plan.bundle)
        return None

    def _clear(self, target: Path, inside: int | None) -> None:
        """Remove what has the name of an entry but is not one: publishing would not replace it."""
        try:
            with private_folder.open_folder(target, inside) as entry:
                names = os.listdir(target if entry is None else entry)
                if plan_file.RECORD in names or not _is_at(target, entry):
                    return
        except FileNotFoundError:
            return
        except IntegrityError:  # not a folder, or others can write to it
            pass
        _remove(target)

    def _missing(self, key: PlanKey, bundle: str, graph_name: str) -> HyperRTError:
        graph = f"{graph_name or 'this graph'}{f' of {bundle}' if bundle else ''}"
        what, do = f"there is no plan of {graph} by {builder(key)}", compile_command(key, bundle)
        near = self.nearest(key, bundle=bundle, graph_name=graph_name)
        if near is None:
            return NotFound(what, f"nothing was compiled for it, or it was removed from {self.folder}", do)
        why = f"that of {near.graph_name} of {near.bundle} was built by {differing(near.key, key)}"
        why += f"; this is {graph}, {differing(key, near.key)}"
        do = compile_command(key, bundle or (near.bundle if near.key.graph == key.graph else ""))
        return Incompatible(what, why, do)


def _read_entry(path: Path, inside: int | None, whole: bool) -> Plan:
    with private_folder.open_folder(path, inside) as entry:
        try:
            record = plan_file.read(path, entry)
            if whole:
                plan_file.check(path, entry, record)
        except FileNotFoundError as error:
            if not _is_at(path, entry):
                raise
            raise IntegrityError(f"{path} is not whole", f"{Path(error.filename).name} is missing") from error
    return _plan(path, record)


def _is_at(path: Path, folder: int | None) -> bool:
    """Whether the open folder still has this name; FileNotFoundError if nothing has it."""
    return folder is None or os.path.samestat(os.fstat(folder), path.lstat())


def _plan(folder: Path, record: plan_file.Record) -> Plan:
    values = {name: value for name, value in vars(record).items() if name != "format"}
    return Plan(path=folder / plan_file.PLAN, **values)


def _rebuild(error: IntegrityError, key: PlanKey, bundle: str) -> IntegrityError:
    return IntegrityError(error.what, error.why, again(error.do, key, bundle))


def _outdated(plan: Plan, newest: dict[str, PlanKey], older_than: float | None) -> str:
    best = newest.get(plan.key.backend, plan.key)
    if _numbers(plan.key.version) < _numbers(best.version):
        return f"built by {maker(plan.key)}; the newest here is of {maker(best)}"
    days = (time.time() - plan.created) / 86400
    return f"built {days:.0f} days ago" if older_than is not None and days > older_than else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d{1,18}", version))


def _only(prefix: str, entries: Iterable[Path]) -> Path:
    """The only entry with an id that begins with `prefix`."""
    list_plans = "hyperrt plans list"
    matches = [path for path in entries if prefix and path.name.startswith(prefix.lower())]
    if not matches:
        why = "give an id or the beginning of an id"
        raise NotFound(f"no plan has the id {prefix[:40]!r}", why, list_plans)
    if len(matches) > 1:
        why = "it could be " + ", ".join(path.name[:SHOWN] for path in matches[:4])
        what = f"{len(matches)} plans have ids that begin with {prefix}"
        raise UsageError(what, why, f"give more digits: {list_plans}")
    return matches[0]


def _remove(path: Path) -> None:
    with contextlib.suppress(NotFound):  # another run has removed it
        files.remove(path)
