"""Does this checkout draw the same latents as another commit, bit for bit?

    python bench/same_latents.py --against b78425f

Both draw the requests of bench/latent_requests.py on one machine, on ONNX Runtime with one thread. Each runs
in a process that imports the packages of its checkout. The bundles are that of the wheel, and small ones with
the structure of SD1.5 and SDXL, which this checkout exports from random weights. Both read the subject files
that the other commit wrote.

    requests         number of requests
    changed          requests whose latents differ in a bit
    images_changed   requests whose pictures differ
    worst_rel        largest max |new - old| / max |old| of the latents

`--write FILE` draws only the requests of the tests, in this checkout, and writes their latents to FILE:

    python bench/same_latents.py --write tests/hyperrt/kept_latents.npz
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import against
import numpy as np
import report

BENCH = Path(__file__).resolve().parent
BARS = {"requests": ">= 24", "changed": "0", "images_changed": "0", "worst_rel": "0"}
TINY = {"tiny": ("tiny", ["REQUESTS", "SEVERAL"])}
KEPT = {"tiny": ("tiny", ["KEPT"])}
SMALL = {  # the folders that small_bundles.py writes
    "sd15-inputs": ["REQUESTS", "SEVERAL"],
    "sdxl-inputs": ["REQUESTS", "SEVERAL", "IMAGE_TOKENS"],
    "sd15-refit": ["REQUESTS"],
    "sdxl-refit": ["REQUESTS", "IMAGE_TOKENS"],
}
Arrays = Mapping[str, np.ndarray]
Bundles = Mapping[str, tuple[str, list[str]]]  # name -> (what Runtime.open takes, groups of requests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="COMMIT", default="HEAD", help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the latents of the tests")
    parser.add_argument(
        "--quick", action="store_true", help="only the requests of the tests, with the bundle in the wheel"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.write:
            latents, _ = drawn(report.ROOT, KEPT, folder)
            np.savez_compressed(args.write, **{key.partition("/")[2]: x for key, x in latents.items()})
            return
        bundles = KEPT if args.quick else TINY | small_bundles(folder / "bundles")
        with against.worktree(args.against) as before:
            old = drawn(before, bundles, folder)
            commit = report.commit(before)
        new = drawn(report.ROOT, bundles, folder)
    report.finish(__file__, compared(new, old), BARS, against=commit)


def small_bundles(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Exports small bundles of SD1.5 and SDXL with this checkout."""
    folder.mkdir()
    code = "import small_bundles; small_bundles.main()"
    against.run(report.ROOT, ["-P", "-c", code, str(folder)], BENCH)
    return {name: (str(folder / name), groups) for name, groups in SMALL.items()}


def drawn(root: Path, bundles: Bundles, folder: Path) -> tuple[Arrays, Arrays]:
    """Draws the requests with a checkout; returns latents and pictures by "BUNDLE/REQUEST".

    Args:
        folder: keeps the subject files, which the first checkout to draw writes.
    """
    with tempfile.TemporaryDirectory() as output:
        words = [str(root), str(folder / "subjects"), output, json.dumps(bundles)]
        code = "import latent_requests; latent_requests.main()"
        against.run(root, ["-P", "-c", code, *words], BENCH)
        return arrays(Path(output) / "latents.npz"), arrays(Path(output) / "images.npz")


def arrays(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)


def compared(new: tuple[Arrays, Arrays], old: tuple[Arrays, Arrays]) -> dict[str, float]:
    """The figures; prints the requests that changed."""
    latents, images = (
        {key for key in after if changed(after[key], before[key])}
        for after, before in zip(new, old, strict=True)
    )
    relative = {key: difference(array, old[0][key]) for key, array in new[0].items()}
    rows = [
        (key, relative[key], key in latents, key in images) for key in relative if key in latents | images
    ]
    report.table(rows, ("request", "relative difference", "latents changed", "pictures changed"))
    return {
        "requests": len(relative),
        "changed": len(latents),
        "images_changed": len(images),
        "worst_rel": max(relative.values()),
    }


def changed(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether a bit differs; -0 and 0 differ, equal NaNs do not."""
    return (new.shape, new.dtype, new.tobytes()) != (old.shape, old.dtype, old.tobytes())


def difference(new: np.ndarray, old: np.ndarray) -> float:
    """max |new - old| / max |old|; infinite if their shapes differ."""
    if new.shape != old.shape:
        return float("inf")
    return float(np.abs(new - old).max() / np.abs(old).max())


if __name__ == "__main__":
    main()
