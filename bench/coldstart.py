"""How long does a command take in a new process, and how large is HyperRT?

Every run is a new process, so imports, opening the bundle, the subject's LoRA and writing the PNG all count.
Figures are medians of several runs, without the first, which fills the disk cache.

    generate_s          wall seconds of `hyperrt generate` with four photos, 30 steps, one picture
    peak_mb             largest resident set of that process and its children (MB = 10^6 bytes)
    help_s              wall seconds of `hyperrt --help`
    forbidden_modules   how many of torch, diffusers, transformers, peft it has loaded at the end
    wheel_mb            the wheel that `pip wheel` builds from the checkout
    install_mb          files that `pip install '.[cpu]'` adds to site-packages in a new virtual environment,
                        with the byte code that pip compiles

The last two need pip's index; --no-install and --against skip them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import against
import report

PHOTOS = report.ROOT / "examples" / "subjects" / "mug"
PROMPT = "a [V] mug on a beach"
FORBIDDEN = ("torch", "diffusers", "transformers", "peft")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "engines", "hyperrt", "training", "export")
HYPERRT = (sys.executable, "-m", "hyperrt")
# Runs the command as `python -m hyperrt` does, and then writes which of these modules it loaded.
SPY = f"""
import sys
from hyperrt.cli.main import main
code = main()
print(*[name for name in {FORBIDDEN!r} if name in sys.modules], sep=",", file=open({{report!r}}, "w"))
sys.exit(code)
"""
BARS = {
    "generate_s": "<= 2.5",
    "peak_mb": "<= 400",
    "help_s": "<= 0.2",
    "forbidden_modules": "0",
    "wheel_mb": "<= 25",
    "install_mb": "<= 300",
}


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--no-install", action="store_true", help="skip wheel_mb and install_mb")
    against.add_options(parser)
    args = parser.parse_args()
    if args.against:
        against.finish(__file__, args, BARS, "--no-install")
        return
    runs = 1 if args.quick else args.runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = generate_options(args.bundle, folder / "picture.png")
        pictures = [run((*HYPERRT, *options)) for _ in range(runs + 1)][1:]
        helps = [run((*HYPERRT, "--help")) for _ in range(runs + 1)][1:]
        figures = {
            "generate_s": median(seconds for seconds, _ in pictures),
            "peak_mb": median(peak for _, peak in pictures),
            "help_s": median(seconds for seconds, _ in helps),
            "forbidden_modules": len(forbidden_modules(options, folder)),
        }
        if not (args.no_install or args.quick):
            figures |= {"wheel_mb": wheel_mb(folder), "install_mb": install_mb(folder)}
    rows = [
        ("generate", *map(median, zip(*pictures, strict=True))),
        ("--help", *map(median, zip(*helps, strict=True))),
    ]
    rows += [("generate, slowest", *max(pictures)), ("--help, slowest", *max(helps))]
    report.table(rows, (f"process, {runs} runs", "seconds", "peak MB"))
    report.finish(__file__, figures, BARS)


def generate_options(bundle: str, output: Path) -> tuple[str, ...]:
    """The arguments of `hyperrt` for one picture."""
    files = ("--bundle", bundle, "--images", str(PHOTOS), "-o", str(output), "--force")
    return ("generate", "--prompt", PROMPT, "--steps", "30", "--seed", "0", *files)


def run(command: Sequence[str]) -> tuple[float, float]:
    """Runs a command; returns its wall seconds and peak resident MB.

    The peak is the largest of the process and the children that it waited for (ru_maxrss). Linux starts
    counting at the size of the process that forks, so this script imports nothing large.

    Raises:
        SystemExit: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=report.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process.stderr:
        errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}\n{errors.decode()}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def forbidden_modules(options: Sequence[str], folder: Path) -> list[str]:
    """The modules of FORBIDDEN that are loaded after a picture was written."""
    path = folder / "modules"
    run((sys.executable, "-c", SPY.format(report=str(path)), *options))
    return [name for name in path.read_text().strip().split(",") if name]


def wheel_mb(folder: Path) -> float:
    """Size of the wheel, built from a copy: a build in the checkout would leave a build/ behind."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "dist"))
    run((*pip, str(copy_of_sources(folder / "wheel"))))
    return next((folder / "dist").glob("*.whl")).stat().st_size / 1e6


def install_mb(folder: Path) -> float:
    """Size of the files that the install adds to the site-packages of a new virtual environment."""
    venv.create(folder / "venv", with_pip=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    before = size_of(packages)
    source = copy_of_sources(folder / "install")
    run((str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", f"{source}[cpu]"))
    return (size_of(packages) - before) / 1e6


def copy_of_sources(folder: Path) -> Path:
    """Copies the files that the wheel is built from into a new folder."""
    folder.mkdir()
    for name in SOURCES:
        source = report.ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    main()
