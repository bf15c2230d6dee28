"""Writes small data sets of every layout with drawn pictures; each function returns the folder."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from hyperrt.training.data import scenes

SIZE = 64


def drawn(number: int = 8, size: int = SIZE) -> Iterator[np.ndarray]:
    """Different pictures [size, size, 3]."""
    rng = np.random.default_rng(number)
    for index in range(number):
        who = scenes.drawn_subject(scenes.NOUNS[index % len(scenes.NOUNS)], "test", index)
        yield scenes.scene(who, scenes.BACKGROUNDS[index % len(scenes.BACKGROUNDS)], rng, size=size)


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    """Encodes a picture as a file of this kind."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def write(folder: Path, names: Iterable[str]) -> Path:
    """Writes a different picture under each name."""
    names = list(names)
    for name, picture in zip(names, drawn(len(names)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture))
    return folder


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar shard of these files."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def composite(left: np.ndarray, right: np.ndarray, padding: int = 8) -> np.ndarray:
    """Two views in one picture, as in Subjects200K."""
    side = len(left)
    canvas = np.full((side + 2 * padding, 2 * side + 3 * padding, 3), 255, np.uint8)
    canvas[padding : padding + side, padding : padding + side] = left
    canvas[padding : padding + side, side + 2 * padding : 2 * side + 2 * padding] = right
    return canvas


def row(item: str, scores: int | None = 5, /, **description: object) -> dict[str, object]:
    """The columns of a row of Subjects200K, without its picture."""
    names = ("compositeStructure", "objectConsistency", "imageQuality")
    return {
        "collection": "collection_1",
        "quality_assessment": None if scores is None else dict.fromkeys(names, scores),
        "description": {
            "item": item,
            "description_0": f"The {item} stands on a beach.",
            "description_1": "Something in the snow.",
            "category": "toys",
            "description_valid": True,
        }
        | description,
    }


def folders(path: Path) -> Path:
    """Four subjects with 3, 1, 2 and 3 photos; each gives its class noun in another way."""
    numbers = {"a": (1, 2, 10), "b": (1,), "c": (1, 2), "d": (1, 2, 3)}
    write(path, [f"{subject}/{number}.png" for subject in numbers for number in numbers[subject]])
    (path / "a" / "class.txt").write_text("robot\n")
    (path / "b" / "metadata.json").write_text('{"class_noun": "stuffed animal"}')
    table = "Classes\n\nsubject_name,class\n\nc,cat\nd,dog\n\nPrompts\n\n'a {0} {1}'.format(token, class),\n"
    (path / "prompts_and_classes.txt").write_text(table)
    return path


def celeba(path: Path) -> Path:
    """Four faces of the training split, one of the evaluation split, one of neither."""
    return write(path, ["0.png", "7.png", "00012.png", "29799.png", "29850.png", "29950.png"])


def afhq(path: Path) -> Path:
    """Two of each class."""
    write(path, [f"train/{kind}/{n}.png" for kind in ("cat", "dog", "wild") for n in (1, 2)])
    return write(path, ["test/cat/9.png"])


def subjects200k(path: Path) -> Path:
    """Four good rows in a tar shard, and one below the quality filter."""
    path.mkdir()
    pictures = list(drawn(10))
    members = []
    for number in range(5):
        content = encoded(composite(*pictures[2 * number : 2 * number + 2]))
        about = row(f"Toy {number}", 4 if number == 2 else 5)
        members += [(f"{number}.png", content), (f"{number}.json", json.dumps(about).encode())]
    tar(path / "part.tar", members)
    return path


def cutouts(path: Path) -> Path:
    """Four cut-outs."""
    path.mkdir()
    for number, colour in enumerate(("red", "green", "blue", "orange")):
        picture = Image.new("RGBA", (48, 64), (0, 0, 0, 0))
        picture.paste(colour, (20, 8, 36, 40))
        picture.save(path / f"{number}.png")
    lines = [f"{number}.png,toy animal,train" for number in range(4)]
    (path / "metadata.csv").write_text("\n".join(["file,class_noun,split", *lines]))
    return path


def webdataset(path: Path) -> Path:
    """Two shards: two photos of each of four subjects, with captions of every kind."""
    path.mkdir()
    pictures = [encoded(picture, "WEBP" if n % 2 else "PNG") for n, picture in enumerate(drawn(8))]
    photos = [[(f"{n}.{v}.{'webp' if v else 'png'}", pictures[2 * n + v]) for v in (0, 1)] for n in range(4)]
    about = json.dumps({"noun": "dog", "caption": "a [V] dog in the snow"}).encode()
    tar(path / "0.tar", [*photos[0], ("0.cls", b"cat"), *photos[1], ("1.json", about)])
    texts = [("2.0.txt", b"A red Robot on a hill"), ("2.1.txt", b"on a beach"), ("2.cls", b"robot")]
    tar(path / "1.tar", [*photos[2], *texts, *photos[3], ("3.cls", b"fish"), ("3.npy", b"passed over")])
    return path
