"""A plan as two files: `plan`, the vendor's bytes, and `plan.json`, which says what they are.

plan.json is as strict as it can be: it holds the hash of itself, and only the very bytes that were written
are read back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperrt import strict_json
from hyperrt.errors import SCARCE, IntegrityError
from hyperrt.plans import private_folder

PLAN, RECORD = "plan", "plan.json"
FORMAT = 1  # of plan.json
MAX_RECORD = 2**22  # bytes of plan.json
MAX_PLAN = 2**50
MAX_CREATED = 2**37  # Unix seconds: the year 6325


@dataclass(frozen=True)
class PlanKey:
    """What decides the bytes of a plan; a LoRA is never part of it.

    Attributes:
        graph: `plans.graph_hash` of the graph.
        backend: whose compiler, "tensorrt" or "tensorrt-rtx".
        version: of the vendor's package, such as "1.7.1.116".
        target: "sm89"; for a plan that was built on the device itself also its name, "sm90 NVIDIA H200".
        sizes: (name, value) of the sizes that are fixed, sorted.
        flags: what else the compiler was told, sorted, such as "refit".

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
        """32 hex digits: the name of the entry."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Record:
    """The contents of plan.json; `plans.Plan` tells of the fields."""

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
    """Hash the plan that was written to a new folder, write plan.json beside it, and shut others out.

    Args:
        folder: holds the plan.
        draft: the record but for size and hash.

    Raises:
        IntegrityError: there is no plan, or an empty one.
    """
    path = folder / PLAN
    folder.chmod(0o700)
    try:
        found = path.lstat()
    except FileNotFoundError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode) or not found.st_size:
        why = f"the backend {draft.key.backend} said that it was done, and left nothing"
        raise IntegrityError("there is no plan to keep", why, "please report it")
    path.chmod(0o600)
    with private_folder.open_file(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = dataclasses.replace(draft, bytes=found.st_size, sha256=sha256)
    with os.fdopen(os.open(folder / RECORD, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(_encode(record))
    return record


def read(folder: Path, inside: int | None) -> Record:
    """What plan.json in a folder of the cache says.

    Args:
        folder: of the plan; its name is the key's id.
        inside: the descriptor of it.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is damaged, of another plan, or others may have written it.
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
        raise IntegrityError(f"{path} is of another plan", f"it tells of {record.key.id}")
    return record


def check(folder: Path, inside: int | None, record: Record) -> None:
    """Compare a plan with what plan.json says of it, to the last bit; arguments and errors as `read`."""
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


def _encode(record: Record) -> bytes:
    body = strict_json.dump(record)
    own = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "own_sha256": own}, indent=1) + "\n").encode()


def _decode(data: bytes) -> Record:
    if len(data) > MAX_RECORD:
        raise strict_json.StrictError(f"it has more than {MAX_RECORD:,} bytes")
    body: Any = strict_json.loads(data)
    if isinstance(body, dict):
        body.pop("own_sha256", None)
    record = strict_json.read(Record, body)
    if _encode(record) != data:
        raise strict_json.StrictError("it is not as it was written: the hash of itself does not fit")
    return record


def _unreadable(path: Path, error: OSError) -> Exception:
    if isinstance(error, FileNotFoundError) or error.errno in SCARCE:
        return error
    return IntegrityError(f"{path} cannot be read", error.strerror or str(error))


def _printable(*texts: str) -> None:
    for text in texts:
        if not text.strip() or not text.isprintable():
            raise ValueError(f"{text[:60]!r} is no name: it must not be empty, nor hold control characters")
