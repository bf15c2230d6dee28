"""The cache of plans: engines that a vendor's compiler made for one kind of device.

A plan is executable code, so it is built on this machine, or by this user for a named target, and never comes
with a bundle.  It lies in `$HYPERRT_HOME/plans/ID/`.  An entry is published whole (`hyperrt/files.py`) and
read with suspicion (`hyperrt/plans/private_folder.py`): a damaged plan may crash the process, a foreign one
may own it.
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

USED = "used"  # file of an entry, of the time of its last use
ATTEMPTS, PAUSE = 40, 0.005  # how often a reader looks again during a replacement, after how many seconds


@dataclass(frozen=True)
class Plan:
    """An entry of the cache.

    Attributes:
        key: what it was built from and for.
        path: the file.
        bytes: its size.
        sha256: its hash.
        bundle: name of the bundle that the graph is of.
        graph_name: such as "denoiser".
        created: Unix seconds.
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
        """The entry, named for the id."""
        return self.path.parent

    @property
    def last_use(self) -> float | None:
        """When it was last loaded, in Unix seconds; None: never, or in a cache that is read-only."""
        try:
            return (self.folder / USED).lstat().st_mtime
        except OSError:
            return None


Plans = list[Plan]  # inside PlanCache `list` is a method
Found = list[Plan | Path]
Reasons = list[tuple[Plan | Path, str]]


def graph_hash(graph: Graph) -> str:
    """sha256 (hex) over the sha256 of a graph's file and of its data file."""
    return hashlib.sha256("\n".join(sha256 for _, sha256 in graph.files()).encode()).hexdigest()


class PlanCache:
    """The plans of a folder; other processes may write to it meanwhile.

    Whatever reads raises IntegrityError where others may write to the folder itself.  The `do` of an
    IntegrityError is a shell command that clears the way.

    Args:
        folder: None for this user's.

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
        """Keep a plan; one that the key has already is replaced.

        Args:
            key: what it is built from and for.
            write: gets the path of a file that is not there yet, and writes the plan to it.
            bundle: name of the graph's bundle.
            graph_name: name of the graph in it.
            weights: names of the weights that can be refitted.

        Raises:
            IntegrityError: others may write to the cache, or `write` wrote nothing.
            ResourceError: the disk is full or broken.
            UsageError: the cache is not writable.
            Whatever `write` raises; nothing is left behind then.
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
        with private_folder.open_folder(self.folder) as inside:  # judged before the work, not after it
            self._clear(target, inside)
        files.publish_folder(target, fill, marker=plan_file.RECORD, force=True)
        return _plan(target, record)

    def find(self, key: PlanKey) -> Plan | None:
        """The plan of a key, as plan.json tells of it; None where there is none that can be read.

        The plan itself is not looked at: that is `load`.
        """
        try:
            return self._read(key.id)
        except IntegrityError:
            return None

    def load(self, key: PlanKey, *, bundle: str = "", graph_name: str = "") -> Plan:
        """The plan of a key, after everything about it was checked, its sha256 included.

        Args:
            key: exactly what is wanted.
            bundle: name of the graph's bundle, for messages and for `nearest`.
            graph_name: name of the graph in it.

        Raises:
            NotFound: there is none.
            Incompatible: there is one of another version, target or bundle.
            IntegrityError: it is damaged, or others may have written it.
        """
        try:
            plan = self._read(key.id, whole=True)
        except IntegrityError as error:
            known = self.find(key)
            raise _rebuild(error, key, bundle or (known.bundle if known else "")) from error
        if plan is None:
            raise self._missing(key, bundle, graph_name)
        with contextlib.suppress(OSError):
            (plan.folder / USED).touch(mode=0o600)
        return plan

    def nearest(self, key: PlanKey, *, bundle: str = "", graph_name: str = "") -> Plan | None:
        """The plan that differs least from a key, among those of the same graph, or of one of that name.

        Where no name is given: of the same graph, or of another one that was built in the same way.
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
        """(folder, the plan as plan.json tells of it or what is wrong) of every entry, by their ids."""
        for name in self._names():
            try:
                plan = self._read(name)
            except IntegrityError as error:
                yield self.folder / name, error
            else:
                if plan is not None:  # else it was removed meanwhile
                    yield self.folder / name, plan

    def list(self) -> Plans:
        """The plans as plan.json tells of them, in order of their ids; without those it does not tell of."""
        return [found for _, found in self.entries() if isinstance(found, Plan)]

    def verify(self) -> Iterator[tuple[Plan | Path, IntegrityError | None]]:
        """Every entry in turn with what is wrong with it; its folder, where plan.json does not tell of it."""
        for path, found in self.entries():
            if isinstance(found, Plan):
                yield found, self._damage(found)
            else:
                yield path, found

    def remove(self, ids: Iterable[str] | None) -> Found:
        """Remove entries, sound or not; all ids are looked up before the first is removed.

        Args:
            ids: ids, or beginnings that only one id has; None removes all.

        Raises:
            NotFound: no entry has it.
            UsageError: several have it, or the cache is not writable.
        """
        entries = dict(self.entries())
        removed: Found = []
        for path in entries if ids is None else dict.fromkeys([_only(prefix, entries) for prefix in ids]):
            found = entries[path]
            _remove(path)
            removed.append(found if isinstance(found, Plan) else path)
        return removed

    def prune(self, *, older_than: float | None = None, dry_run: bool = False) -> Reasons:
        """Remove what is of no use: what is damaged, what another than the newest version of a backend built,
        and what killed runs left.

        Args:
            older_than: days; what was built before them is removed, too.
            dry_run: remove nothing, only say it.

        Returns:
            (what was removed, why).
        """
        chosen: Reasons = []
        plans = sorted(self.list(), key=lambda plan: _numbers(plan.key.version))
        newest = {plan.key.backend: plan.key for plan in plans}
        for path, found in self.entries():
            if not isinstance(found, Plan):
                chosen.append((path, found.what))
            elif why := _outdated(found, newest, older_than):
                chosen.append((found, why))
            elif damage := self._damage(found):
                chosen.append((found, damage.what))
        if not dry_run:
            for gone, _ in chosen:
                _remove(gone.folder if isinstance(gone, Plan) else gone)
        left = files.sweep(self.folder, dry_run)
        return chosen + [(path, "left by a run that was killed") for path in left]

    def _names(self) -> Sequence[str]:
        try:
            with private_folder.open_folder(self.folder) as descriptor:
                names = os.listdir(self.folder if descriptor is None else descriptor)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if re.fullmatch("[0-9a-f]{32}", name))

    def _read(self, name: str, whole: bool = False) -> Plan | None:
        """The entry of that id; with `whole` the plan itself was checked, too.  None where there is none."""
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
        """Whether an entry that was not there is there by now, or a writer may be putting it there."""
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
        """Remove what has the name of an entry and is none, as publishing would refuse to replace it."""
        try:
            with private_folder.open_folder(target, inside) as entry:
                names = os.listdir(target if entry is None else entry)
                if plan_file.RECORD in names or not _is_at(target, entry):
                    return
        except FileNotFoundError:
            return
        except IntegrityError:  # not a folder, or not ours alone
            pass
        _remove(target)

    def _missing(self, key: PlanKey, bundle: str, graph_name: str) -> HyperRTError:
        wanted = f"{graph_name or 'this graph'}{f' of {bundle}' if bundle else ''}"
        what, do = f"there is no plan of {wanted} by {builder(key)}", compile_command(key, bundle)
        near = self.nearest(key, bundle=bundle, graph_name=graph_name)
        if near is None:
            return NotFound(what, f"nothing was compiled for it, or it was removed from {self.folder}", do)
        why = f"that of {near.graph_name} of {near.bundle} was built by {differing(near.key, key)}"
        why += f"; this is {wanted}, {differing(key, near.key)}"
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
    """Whether the open folder still has this name; FileNotFoundError where nothing has it."""
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
    """The one entry whose id begins so."""
    shown = "hyperrt plans list"
    found = [path for path in entries if prefix and path.name.startswith(prefix.lower())]
    if not found:
        raise NotFound(f"no plan has the id {prefix[:40]!r}", "an id, or how it begins, is wanted", shown)
    if len(found) > 1:
        why = "it could be " + ", ".join(path.name[:SHOWN] for path in found[:4])
        raise UsageError(f"the id {prefix} is that of {len(found)} plans", why, f"give more of it: {shown}")
    return found[0]


def _remove(path: Path) -> None:
    with contextlib.suppress(NotFound):  # another run was quicker
        files.remove(path)
