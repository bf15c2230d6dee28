"""Protocols: the subjects, prompts and scorers of an evaluation.

dreambench  DIR/SUBJECT/photos; the 30 subjects of DreamBench, or others listed in DIR/metadata.csv, which has
            the columns subject, class_noun and live (1 for people and animals)
faces       DIR/photo or DIR/SUBJECT/photos: every file and every folder is a face; of CelebA-HQ
            (DIR/0.jpg ... 29999.jpg) only the last 100, which no training sees
afhq        the same for animals; in the folders DIR/cat, DIR/dog and DIR/wild of AFHQ every file is an
            animal; of a complete AFHQ (DIR/train, DIR/test) only DIR/test is used
drawn       drawn subjects that no training has seen; needs no folder
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
from hyperrt.text import printable
from hyperrt.training.data import folders
from hyperrt.training.evaluation import drawn, prompt_packs
from hyperrt.training.evaluation.drawn import Case
from hyperrt.training.evaluation.prompt_packs import Pack

TABLE = "metadata.csv"
DREAMBENCH_SETTINGS = {  # pictures of each subject and prompt -> name of the setting
    4: "official: 4 pictures of each subject and prompt, 3,000 in all (the papers' text)",
    1: "fast: 1 picture of each subject and prompt, 750 in all (PatchDPO's evaluator: seed 42, 30 steps)",
}


@dataclass(frozen=True)
class EvaluationProtocol:
    """What two evaluations must share to be comparable.

    Attributes:
        scorers: the default ones, of training/evaluation/scorers.py.
        limit: default number of subjects; None: all.
        subjects: number of subjects of a complete run; None: `limit`.
        average: scores whose mean is `avg`, as in the paper's table.
    """

    name: str
    scorers: tuple[str, ...]
    limit: int | None = None
    subjects: int | None = None
    average: tuple[str, ...] = ()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EvaluationProtocol("dreambench", ("clip", "dino"), subjects=30, average=("dino", "clip_i", "clip_t")),
        EvaluationProtocol("faces", ("clip", "dino", "face"), limit=100),
        EvaluationProtocol("afhq", ("clip", "dino"), limit=100),
        EvaluationProtocol("drawn", ("identity", "colours", "background"), limit=40),
    )
}


@dataclass(frozen=True, eq=False)
class EvaluationSubject:
    """A subject of an evaluation; its photos are not read yet.

    Attributes:
        name: of the folder of its pictures.
        path: a folder of photos, or one photo; None for a drawn subject.
        case: the drawn subject.
    """

    name: str
    noun: str
    pack: Pack
    path: Path | None = None
    case: Case | None = None

    def photos(self) -> load.Photos:
        """The usable photos, and the reasons why others are left out.

        The hypernetwork reads these photos, and pictures are compared with them.

        Raises:
            BadInput: no photo can be used.
            NotFound: the photos were removed meanwhile.
        """
        if self.case is not None:
            return load.Photos(self.case.photos, [f"photo {k}" for k in range(len(self.case.photos))])
        assert self.path is not None
        if self.path.is_dir():
            return load.load_folder(self.path)
        return load.Photos([load.load_image(self.path)], [printable(self.path.name)])


@dataclass(frozen=True)
class SubjectList:
    """The subjects of a run, and (name, reason) of those that are left out."""

    subjects: tuple[EvaluationSubject, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def select(self, only: Sequence[str] = (), limit: int | None = None) -> SubjectList:
        """The subjects with these names, and at most `limit`, spread evenly over the nouns.

        Raises:
            NotFound: a name is unknown.
        """
        names = {subject.name for subject in self.subjects}
        for name in only:
            if name not in names:
                why = f"there are {', '.join(sorted(names)[:8])}{' …' if len(names) > 8 else ''}"
                raise NotFound(f"there is no subject {name!r}", why, "check --only")
        named = [subject for subject in self.subjects if not only or subject.name in only]
        selected = {id(subject) for subject in list(_alternating_nouns(named))[:limit]}
        return SubjectList(tuple(subject for subject in named if id(subject) in selected), self.left_out)


def subjects(protocol: EvaluationProtocol, folder: Path | None) -> SubjectList:
    """All subjects of a protocol in a folder.

    Raises:
        NotFound: the folder does not exist.
        BadInput: it holds no subject.
    """
    if protocol.name == "drawn":
        return SubjectList(tuple(_drawn()))
    if folder is None or not folder.is_dir():
        why = f"the protocol {protocol.name} reads the photos of its subjects there"
        raise NotFound(f"there is no folder {folder}", why, "name it with --subjects DIR")
    listed = {"dreambench": _dreambench, "faces": _faces, "afhq": _animals}[protocol.name](folder)
    if not listed.subjects:
        why = "; ".join(f"{name}: {reason}" for name, reason in listed.left_out[:3]) or "it is empty"
        what = f"{folder} holds no subject of {protocol.name}"
        raise BadInput(what, why, "see training/evaluation/protocols.py")
    return listed


def missing(protocol: EvaluationProtocol, subjects: Iterable[EvaluationSubject]) -> list[str]:
    """Names of DreamBench's subjects that are missing; empty for other protocols."""
    names = {subject.name for subject in subjects}
    return [name for name in prompt_packs.DREAMBENCH if name not in names] if protocol.subjects else []


def _drawn() -> Iterator[EvaluationSubject]:
    pack = prompt_packs.PACKS["drawn-v1"]
    for k, case in enumerate(drawn.cases_of(seed=0)):
        yield EvaluationSubject(f"{case.noun}-{k % drawn.PER_NOUN}", case.noun, pack, case=case)


def _dreambench(folder: Path) -> SubjectList:
    published = {name: (noun, noun in prompt_packs.LIVE) for name, noun in prompt_packs.DREAMBENCH.items()}
    nouns = _table(folder) | published
    listed, left_out = [], []
    for path in _visible(folder):
        if not path.is_dir():
            continue
        if path.name not in nouns:
            why = f"it is not a subject of DreamBench, and {TABLE} does not give its class noun"
            left_out.append((printable(path.name), why))
            continue
        noun, live = nouns[path.name]
        pack = prompt_packs.PACKS["dreambench-live" if live else "dreambench-objects"]
        listed.append(EvaluationSubject(_folder_name(path.name), noun, pack, path))
    return SubjectList(tuple(listed), tuple(left_out))


def _table(folder: Path) -> dict[str, tuple[str, bool]]:
    """Subject -> (class noun, whether it is live), from metadata.csv; empty without this file."""
    if not (folder / TABLE).is_file():
        return {}
    with (folder / TABLE).open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if row.get("subject") and row.get("class_noun")]
    return {row["subject"]: (row["class_noun"].strip(), row.get("live") == "1") for row in rows}


def _faces(folder: Path) -> SubjectList:
    pack = prompt_packs.PACKS["hyperrt-faces-v1"]
    paths = [path for path in _visible(folder) if path.is_dir() or _is_photo(path)]
    numbers = {path: folders.number(path) for path in paths if not path.is_dir()}
    unseen = [path for path, number in numbers.items() if number in folders.CELEBA["eval"]]
    return SubjectList(
        tuple(EvaluationSubject(_folder_name(path.name), "face", pack, path) for path in unseen or paths)
    )


def _animals(folder: Path) -> SubjectList:
    """Raises BadInput if the folder holds AFHQ without its test split."""
    pack = prompt_packs.PACKS["dreambench-live"]
    listed = []
    for path in _visible(_afhq_test(folder)):
        if path.is_dir() and path.name in folders.AFHQ:
            for file in filter(_is_photo, _visible(path)):
                name = _folder_name(f"{path.name}-{file.name}")
                listed.append(EvaluationSubject(name, folders.AFHQ[path.name], pack, file))
        elif path.is_dir() or _is_photo(path):
            listed.append(EvaluationSubject(_folder_name(path.name), "animal", pack, path))
    return SubjectList(tuple(listed))


def _afhq_test(folder: Path) -> Path:
    """The test split if `folder` is a complete AFHQ; otherwise `folder`."""
    splits = {split: folder / split for names in folders.AFHQ_SPLITS.values() for split in names}
    present = {name for name, path in splits.items() if any((path / kind).is_dir() for kind in folders.AFHQ)}
    if not present:
        return folder
    for name in folders.AFHQ_SPLITS["eval"]:
        if name in present:
            return splits[name]
    why = "it holds only AFHQ's train split, and an evaluation uses pictures that no training sees"
    do = "add its folder test, or name another folder"
    raise BadInput(f"{folder} has no animals to evaluate", why, do)


def _visible(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in load.entries(folder)]


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in load.SUFFIXES


def _folder_name(name: str) -> str:
    """A unique name that every file system and link accepts."""
    return quote(os.fsencode(name), safe=" ")


def _alternating_nouns(subjects: Sequence[EvaluationSubject]) -> Iterator[EvaluationSubject]:
    """The first subject of each noun, then the second of each, and so on."""
    by_noun: dict[str, list[EvaluationSubject]] = {}
    for subject in subjects:
        by_noun.setdefault(subject.noun, []).append(subject)
    for row in zip_longest(*by_noun.values()):
        yield from (subject for subject in row if subject is not None)
