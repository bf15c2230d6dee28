"""Writes, reads and checks the two files of a plan: `plan`, the vendor's bytes, and their record `plan.json`.

The folder's name is the hash of the key in plan.json, and plan.json has the sha256 of the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from hyperrt import strict_json
from hyperrt.errors import SCARCE, IntegrityError
from hyperrt.plans import private_folder

PLAN, RECORD = "plan", "plan.json"
FORMAT = 2  # of plan.json; part of the id, so that plans of another format are not found
MAX_RECORD = 2**22  # bytes of plan.json
MAX_PLAN = 2**50
MAX_CREATED = 2**37  # Unix seconds: the year 6325


@dataclass(frozen=True)
class PlanKey:
    """Everything that the bytes of a plan depend on; never a LoRA.

    Attributes:
        graph: `plans.graph_hash` of the graph.
        backend: "tensorrt" or "tensorrt-rtx".
        version: of the vendor's package, such as "1.7.1.116".
        target: "sm89"; also the GPU's name if the plan was built on the GPU itself, "sm90 NVIDIA H200".
        sizes: (name, value) of the sizes that are fixed, sorted.
        flags: other settings of the compiler, sorted, such as "refit".

    Raises:
        ValueError: a text is empty or not printable, or something is not sorted.
    """

    graph: str
    backend: str
    version: str
    target: str
    sizes: tuple[tuple[str, int], ...]
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        strict_json.check_sha256(graph=self.graph)
        _printable(self.backend, self.version, self.target, *dict(self.sizes), *self.flags)
        if list(self.sizes) != sorted(dict(self.sizes).items()):
            raise ValueError("sizes must be sorted, and no name twice")
        if list(self.flags) != sorted(set(self.flags)):
            raise ValueError("flags must be sorted, and none twice")

    @property
    def id(self) -> str:
        """32 hex digits, the name of the entry's folder."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Record:
    """The contents of plan.json; `Plan` in cache.py explains the fields."""

    format: int
    key: PlanKey
    bytes: int
    sha256: str
    bundle: str
    graph_name: str
    created: float
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is {str(self.format)[:20]}; this version reads {FORMAT}")
        strict_json.check_sha256(sha256=self.sha256)
        _printable(self.bundle, self.graph_name, *self.weights)
        for name, value, most in (("bytes", self.bytes, MAX_PLAN), ("created", self.created, MAX_CREATED)):
            if not 0 <= value <= most:
                raise ValueError(f"{name} is {str(value)[:20]}; it must be from 0 to {most}")


def finish(folder: Path, draft: Record) -> Record:
    """Hash a new plan, write plan.json beside it, and make both accessible to this user alone.

    Args:
        folder: holds the plan.
        draft: the record without size and hash.

    Raises:
        IntegrityError: the plan is missing or empty.
    """
    path = folder / PLAN
    folder.chmod(0o700)
    try:
        status = path.lstat()
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode) or not status.st_size:
        why = f"the backend {draft.key.backend} reported success and wrote nothing"
        raise IntegrityError("the compiler wrote no plan", why, "please report it")
    path.chmod(0o600)
    with private_folder.open_file(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = dataclasses.replace(draft, bytes=status.st_size, sha256=sha256)
    with os.fdopen(os.open(folder / RECORD, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(json.dumps(strict_json.dump(record), indent=1).encode())
    return record


def read(folder: Path, inside: int | None) -> Record:
    """Read plan.json from a folder of the cache.

    Args:
        folder: of the plan; its name is the key's id.
        inside: the descriptor of the folder.

    Raises:
        FileNotFoundError: it does not exist.
        IntegrityError: it is damaged, belongs to another plan, or others could have written it.
    """
    path = folder / RECORD
    try:
        with private_folder.open_file(path, inside) as file:
            data = file.read(MAX_RECORD + 1)
        record = _decode(data)
    except strict_json.StrictError as error:
        raise IntegrityError(f"{path} is damaged", str(error)) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if record.key.id != folder.name:
        raise IntegrityError(f"{path} belongs to another plan", f"its key has the id {record.key.id}")
    return record


def check(folder: Path, inside: int | None, record: Record) -> None:
    """Compare a plan's size and sha256 with its record; arguments and errors as `read`."""
    path = folder / PLAN
    try:
        with private_folder.open_file(path, inside) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes:
                why = f"it has {size:,} bytes, and {RECORD} says {record.bytes:,}"
                raise IntegrityError(f"{path} is damaged", why)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    if sha256 != record.sha256:
        why = f"its sha256 is {sha256[:16]}…, and {RECORD} says {record.sha256[:16]}…"
        raise IntegrityError(f"{path} is damaged", why)


def _decode(data: bytes) -> Record:
    if len(data) > MAX_RECORD:
        raise strict_json.StrictError(f"it has more than {MAX_RECORD:,} bytes")
    return strict_json.read(Record, strict_json.loads(data))


def _unreadable(path: Path, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError) or error.errno in SCARCE:
        return error
    return IntegrityError(f"{path} cannot be read", error.strerror or str(error))


def _printable(*texts: str) -> None:
    for text in texts:
        if not text.strip() or not text.isprintable():
            raise ValueError(f"{text[:60]!r} is not a name: it must not be empty or have control characters")
