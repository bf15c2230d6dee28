"""Checks the installation, the backends and a bundle's files, and draws a test picture.

The checks are independent: all run, even if one fails. They change nothing, send nothing, and show no value
of the environment.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyperrt import engines
from hyperrt.cli.checks import Check, guarded
from hyperrt.engines import telemetry
from hyperrt.engines.backends import DEFAULT
from hyperrt.engines.nvidia import driver as nvidia
from hyperrt.errors import Incompatible, IntegrityError
from hyperrt.text import advice
from hyperrt.version import VERSION


def run(bundle: str = "tiny", backend: str = "auto") -> Iterator[Check]:
    """Run every check, and yield its result.

    Args:
        bundle: name or folder of the bundle to check and run.
        backend: the backend that runs it; "auto" selects the best for this machine.

    Raises:
        BackendMissing: the backend does not exist.
    """
    asked, backend = backend, engines.resolve(backend)
    yield Check(
        "hyperrt", "ok", f"{VERSION}, Python {platform.python_version()}, {platform.platform(terse=True)}"
    )
    yield guarded("dependencies", _dependencies)
    yield guarded("NVIDIA GPU", functools.partial(_gpu, wanted=engines.BACKENDS[backend].nvidia))
    for name, about in engines.BACKENDS.items():
        if not about.for_tests:
            yield guarded(f"backend {name}", functools.partial(_backend, name, wanted=name == backend))
    yield guarded("one ONNX Runtime", _one_onnxruntime)
    yield guarded("telemetry", _telemetry)
    hashes = guarded(f"bundle {bundle}", functools.partial(_bundle, bundle))
    yield hashes
    if hashes.status != "fail":
        yield guarded("test run", functools.partial(_test_run, bundle, asked))


def _dependencies() -> Check:
    """Check that every dependency of the distribution is installed."""
    try:
        requirements = importlib.metadata.requires("hyperrt") or []
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "dependencies",
            "warn",
            "HyperRT runs from a folder and is not installed",
            shlex.join(["pip", "install", f"{Path(__file__).parents[2]}[cpu]"]),
        )
    names = [re.split(r"[^A-Za-z0-9._-]", entry)[0] for entry in requirements if "extra ==" not in entry]
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if not version]
    if missing:
        return Check(
            "dependencies",
            "fail",
            f"missing: {', '.join(missing)}",
            "pip install --force-reinstall hyperrt",
            4,
        )
    return Check("dependencies", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu(wanted: bool) -> Check:
    """Check that the driver works and finds a GPU; a missing GPU fails only if the backend needs it."""
    try:
        driver = nvidia.driver()
    except engines.EngineError as error:
        if wanted:
            raise
        return Check("NVIDIA GPU", "ok", f"none: {error.what}", error.do)
    gpus = [
        f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]}, {gpu.memory / 1e9:.0f} GB)"
        for gpu in driver.gpus
    ]
    major, minor = driver.cuda
    version = f"driver {driver.version}, " if driver.version else ""
    return Check("NVIDIA GPU", "ok", f"{version}CUDA {major}.{minor}; {', '.join(gpus)}")


def _backend(name: str, wanted: bool) -> Check:
    """Check that the vendor's package is installed and works; only the requested backend can fail."""
    about = engines.BACKENDS[name]
    title = f"backend {name}"
    if not importlib.util.find_spec(about.vendor):
        status, code = ("fail", engines.BackendMissing.code) if wanted else ("ok", 0)
        return Check(title, status, "not installed", about.install, code)
    versions = [version for package in about.packages if (version := _version(package))]
    detail = " ".join([about.vendor, *versions[:1]])
    status = "warn"
    try:
        if about.nvidia:
            module = engines.load(name)
            status = "ok"  # a machine without a GPU may have such a package
            _check_device(module, name)
    except engines.EngineError as error:
        if wanted:
            raise
        return Check(title, status, f"{detail}; {error.what}: {error.why}", error.do)
    return Check(title, "ok", detail)


def _check_device(module: Any, name: str) -> None:
    """Raise if the backend cannot use the driver, the GPU or this build of the package."""
    about = engines.BACKENDS[name]
    if hasattr(module, "check"):
        module.check(**about.options)
    else:
        nvidia.check_cuda(nvidia.driver(), _cuda_of(about.vendor), about.vendor)


def _cuda_of(distribution: str) -> int | None:
    """Major version of CUDA that a package is built for, read from the names of its requirements."""
    try:
        requirements = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    match = re.search(r"[_-]cu(\d\d)", " ".join(requirements))
    return int(match[1]) if match else None


def _one_onnxruntime() -> Check:
    installed = [name for name in engines.BACKENDS[DEFAULT].packages if _version(name)]
    if len(installed) < 2:
        return Check("one ONNX Runtime", "ok", ", ".join(installed) or "none")
    raise Incompatible(
        "two ONNX Runtimes are installed",
        f"{' and '.join(installed)} overwrite each other's files",
        advice("remove both, then install the one you need", "pip", "uninstall", "--yes", *installed),
    )


def _telemetry() -> Check:
    """Check that the vendors' telemetry is off; runs after the backends, which load the packages."""
    if left := telemetry.left_on():
        do = "run hyperrt in its own process: another program in this process switched it on"
        return Check("telemetry", "warn", f"on: {', '.join(left)}", do)
    return Check("telemetry", "ok", f"off: {', '.join([*telemetry.VARIABLES, telemetry.OPENVINO])}")


def _bundle(name: str) -> Check:
    """Check that every file of the bundle has the hash in the manifest."""
    from hyperrt.bundle.bundle import Bundle

    bundle = Bundle.open(name)
    bundle.verify()
    files = [file for graph in bundle.graphs.values() for file, _ in graph.files()]
    size = sum((bundle.path / file).stat().st_size for file in files)
    return Check(
        f"bundle {name}",
        "ok",
        f"{bundle.name}: {len(bundle.graphs)} graphs, {size / 1e6:.1f} MB, hashes agree",
    )


def _test_run(name: str, backend: str) -> Check:
    """Draw with a random photo, two steps; afterwards the base model must give the same bits as before."""
    import numpy as np

    from hyperrt.runtime import Runtime

    with Runtime.open(name, backend) as runtime:
        photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        subject = runtime.personalize([photo])
        rules = runtime.bundle.prompts
        prompt = f"a {rules.placeholder} {rules.default_class}"
        plain = f"a {rules.default_class}"
        before = runtime.generate(plain, steps=2, seed=0)
        personal = runtime.generate(prompt, subject, steps=2, seed=0)
        after = runtime.generate(plain, steps=2, seed=0)
    if not np.array_equal(before.latents, after.latents):
        do = "report it, with the output of hyperrt doctor --json"
        raise IntegrityError("the base model does not come back after a subject", "its latents differ", do)
    height, width = personal.images.shape[1:3]
    done = f"{runtime.backend}: photos to a {width} x {height} picture; the base model comes back"
    return Check("test run", "ok", done)
