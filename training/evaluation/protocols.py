"""Protocols: whose pictures an evaluation draws, with which prompts, and what judges them.

dreambench  DIR/SUBJECT/photos; the 30 subjects of DreamBench, or others that DIR/metadata.csv names with
            the columns subject, class_noun and, for live ones, live (1)
faces       DIR/photo or DIR/SUBJECT/photos: every file and every folder is a face of its own; of CelebA-HQ
            (DIR/0.jpg ... 29999.jpg) the last 100 alone, which no training sees
afhq        the same for animals; in DIR/cat, DIR/dog and DIR/wild, as AFHQ lies on the disk, every file
            is an animal of its own; of AFHQ whole (DIR/train, DIR/test) those of DIR/test alone
drawn       drawn subjects that no training has seen; no folder
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote

from hyperrt.errors import BadInput, NotFound
from hyperrt.photos import load
from hyperrt.training.data import folders
from hyperrt.training.evaluation import drawn, prompt_packs
from hyperrt.training.evaluation.drawn import Case
from hyperrt.training.evaluation.prompt_packs import Pack

TABLE = "metadata.csv"
DREAMBENCH_SETTINGS = {  # pictures of a subject and prompt -> the setting's name
    4: "official: 4 pictures of each subject and prompt, 3,000 in all (the papers' text)",
    1: "fast: 1 picture of each subject and prompt, 750 in all (PatchDPO's evaluator: seed 42, 30 steps)",
}


@dataclass(frozen=True)
class Protocol:
    """What makes figures comparable.

    Attributes:
        scorers: of training/evaluation/scorers.py, by default.
        limit: subjects, by default; None: all.
        subjects: that a complete run has; None: as many as `limit`.
        average: figures whose mean is `avg`, as the paper's table has it.
    """

    name: str
    scorers: tuple[str, ...]
    limit: int | None = None
    subjects: int | None = None
    average: tuple[str, ...] = ()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("dreambench", ("clip", "dino"), subjects=30, average=("dino", "clip_i", "clip_t")),
        Protocol("faces", ("clip", "dino", "face"), limit=100),
        Protocol("afhq", ("clip", "dino"), limit=100),
        Protocol("drawn", ("identity", "colours", "background"), limit=40),
    )
}


@dataclass(frozen=True, eq=False)
class EvaluationSubject:
    """A subject of an evaluation; its photos are read when it is its turn.

    Attributes:
        name: of the folder of its pictures.
        path: a folder of photos, or one photo.
        case: of a drawn subject.
    """

    name: str
    noun: str
    pack: Pack
    path: Path | None = None
    case: Case | None = None

    def photos(self) -> load.Photos:
        """What the hypernetwork sees and pictures are compared with; what was left out, and why.

        Raises:
            BadInput: none can be used.
            NotFound: they were removed meanwhile.
        """
        if self.case is not None:
            return load.Photos(self.case.photos, [f"photo {k}" for k in range(len(self.case.photos))])
        assert self.path is not None
        if self.path.is_dir():
            return load.load_folder(self.path)
        return load.Photos([load.load_image(self.path)], [load.printable(self.path.name)])


@dataclass(frozen=True)
class SubjectList:
    """The subjects of a run, and (name, reason) of what was left out."""

    entries: tuple[EvaluationSubject, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def chosen(self, only: Sequence[str] = (), limit: int | None = None) -> SubjectList:
        """Those of some names, or as many, taken in turns from the nouns, in their order.

        Raises:
            NotFound: there is no subject of that name.
        """
        known = {entry.name for entry in self.entries}
        for name in only:
            if name not in known:
                why = f"there are {', '.join(sorted(known)[:8])}{' …' if len(known) > 8 else ''}"
                raise NotFound(f"there is no subject {name!r}", why, "check --only")
        kept = [entry for entry in self.entries if not only or entry.name in only]
        some = {id(entry) for entry in list(_in_turns(kept))[:limit]}
        return SubjectList(tuple(entry for entry in kept if id(entry) in some), self.left_out)


def subjects(protocol: Protocol, folder: Path | None) -> SubjectList:
    """All subjects of a protocol in a folder.

    Raises:
        NotFound: there is no such folder.
        BadInput: it holds no subject.
    """
    if protocol.name == "drawn":
        pack = prompt_packs.PACKS["drawn-v1"]
        cases = enumerate(drawn.cases_of(seed=0))
        return SubjectList(
            tuple(
                EvaluationSubject(f"{case.noun}-{k % drawn.PER_NOUN}", case.noun, pack, case=case)
                for k, case in cases
            )
        )
    if folder is None or not folder.is_dir():
        why = f"the protocol {protocol.name} reads its subjects' photos there"
        raise NotFound(f"there is no folder {folder}", why, "name it with --subjects DIR")
    found = {"dreambench": _dreambench, "faces": _faces, "afhq": _animals}[protocol.name](folder)
    if not found.entries:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.left_out[:3]) or "it is empty"
        what = f"{folder} holds no subject of {protocol.name}"
        raise BadInput(what, why, "see training/evaluation/protocols.py")
    return found


def missing(protocol: Protocol, entries: Iterable[EvaluationSubject]) -> list[str]:
    """Subjects of DreamBench that are not there; none for other protocols."""
    found = {entry.name for entry in entries}
    return [name for name in prompt_packs.DREAMBENCH if name not in found] if protocol.subjects else []


def _dreambench(folder: Path) -> SubjectList:
    known = {name: (noun, noun in prompt_packs.LIVE) for name, noun in prompt_packs.DREAMBENCH.items()}
    nouns = _table(folder) | known
    entries, left_out = [], []
    for path in _visible(folder):
        if not path.is_dir():
            continue
        if path.name not in nouns:
            why = f"it is none of DreamBench's, and {TABLE} does not say its class noun"
            left_out.append((load.printable(path.name), why))
            continue
        noun, live = nouns[path.name]
        pack = prompt_packs.PACKS["dreambench-live" if live else "dreambench-objects"]
        entries.append(EvaluationSubject(_folder_name(path.name), noun, pack, path))
    return SubjectList(tuple(entries), tuple(left_out))


def _table(folder: Path) -> dict[str, tuple[str, bool]]:
    """Subject -> (class noun, whether it is live) as metadata.csv says; empty where there is none."""
    if not (folder / TABLE).is_file():
        return {}
    with (folder / TABLE).open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if row.get("subject") and row.get("class_noun")]
    return {row["subject"]: (row["class_noun"].strip(), row.get("live") == "1") for row in rows}


def _faces(folder: Path) -> SubjectList:
    pack = prompt_packs.PACKS["hyperrt-faces-v1"]
    found = [path for path in _visible(folder) if path.is_dir() or _is_photo(path)]
    numbers = {path: folders.number(path) for path in found if not path.is_dir()}
    unseen = [path for path, number in numbers.items() if number in folders.CELEBA["eval"]]
    return SubjectList(
        tuple(EvaluationSubject(_folder_name(path.name), "face", pack, path) for path in unseen or found)
    )


def _animals(folder: Path) -> SubjectList:
    """Errors: BadInput where AFHQ is there without its test."""
    pack = prompt_packs.PACKS["dreambench-live"]
    entries = []
    for path in _visible(_unseen_of_afhq(folder)):
        if path.is_dir() and path.name in folders.AFHQ:
            for file in filter(_is_photo, _visible(path)):
                name = _folder_name(f"{path.name}-{file.name}")
                entries.append(EvaluationSubject(name, folders.AFHQ[path.name], pack, file))
        elif path.is_dir() or _is_photo(path):
            entries.append(EvaluationSubject(_folder_name(path.name), "animal", pack, path))
    return SubjectList(tuple(entries))


def _unseen_of_afhq(folder: Path) -> Path:
    """Of the folder above AFHQ's train and test the test; another one is itself."""
    splits = {split: folder / split for names in folders.AFHQ_SPLITS.values() for split in names}
    there = {name for name, path in splits.items() if any((path / kind).is_dir() for kind in folders.AFHQ)}
    if not there:
        return folder
    for name in folders.AFHQ_SPLITS["eval"]:
        if name in there:
            return splits[name]
    why = "it has AFHQ's train alone, and an evaluation is of what no training sees"
    raise BadInput(f"{folder} has no animals to evaluate", why, "add its folder test, or name another")


def _visible(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in load.entries(folder)]


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in load.SUFFIXES


def _folder_name(name: str) -> str:
    """A name that every file system and link takes, and that no other name has."""
    return quote(os.fsencode(name), safe=" ")


def _in_turns(entries: Sequence[EvaluationSubject]) -> Iterator[EvaluationSubject]:
    """The first of each noun, then the second of each."""
    by_noun: dict[str, list[EvaluationSubject]] = {}
    for entry in entries:
        by_noun.setdefault(entry.noun, []).append(entry)
    for row in zip_longest(*by_noun.values()):
        yield from (entry for entry in row if entry is not None)
