"""Opens a bundle's graphs on a backend when they are first needed, and keeps them open until `free`.

A backend that compiles takes the sizes of a call when a graph is opened; if they change, the graph is opened
again. Compiled graphs are kept in this user's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperrt import engines
from hyperrt.arguments import in_range
from hyperrt.bundle.bundle import EXPORT_AGAIN, Bundle
from hyperrt.bundle.manifest import spec_text
from hyperrt.engines.backends import BACKENDS, DEFAULT, names
from hyperrt.engines.base import Engine
from hyperrt.engines.errors import listed
from hyperrt.errors import BundleMismatch, HyperRTError, UsageError
from hyperrt.plans import build, private_folder
from hyperrt.plans.cache import Plan
from hyperrt.sampling.options import MAX_DEVICE, MAX_THREADS
from hyperrt.session.resident import Resident

OWN_OPTIONS = {"path", "backend", "threads", "sizes", "device", "plan", "weights"}  # that HyperRT sets

Sizes = Mapping[str, int]


class Graphs:
    """The open graphs of one bundle; not for two threads at once.

    Args:
        bundle: whose.
        backend: one of `engines.BACKENDS`, or "auto".
        threads: CPU threads of one engine call; None lets the backend decide.
        options: the backend's own, see `engines.open`.
        device: which GPU, for backends that run on one.

    Raises:
        BackendMissing: there is no such backend.
        BundleMismatch: the bundle's LoRA enters by refit, which the backend cannot do.
        UsageError: `threads` or `device` is out of range, or `device` is not 0 and the backend runs on the
            processor.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        threads: int | None,
        options: Mapping[str, Any] | None = None,
        device: int = 0,
    ) -> None:
        self.bundle = bundle
        in_range("threads", threads, 1, MAX_THREADS)
        in_range("device", device, 0, MAX_DEVICE)
        self.backend = _backend(bundle, backend)
        _check_device(self.backend, device)
        self._device = device
        self._threads = threads
        self._options = dict(options or {})
        if own := self._options.keys() & OWN_OPTIONS:
            why = "HyperRT sets it itself; threads and device are arguments of Runtime.open"
            raise UsageError(f"{min(own)!r} is no backend option", why, "leave it out")
        self._residents: dict[str, Resident] = {}
        self._compared: set[str] = set()  # plans, by their sha256
        self._closed = False

    @property
    def open_names(self) -> set[str]:
        """Names of the graphs that are open."""
        return set(self._residents)

    def open(self, name: str, sizes: Sizes | None = None) -> Engine:
        """A new engine of a graph, for the caller to close.

        Raises:
            BundleMismatch: the constants that a refit replaces are not those that the manifest names.
            NotFound, Incompatible, IntegrityError: there is no plan for this machine, or none to be trusted.
            NumericError: a plan that is opened for the first time computes something else than its graph.
            engines.EngineError: it cannot be opened.
        """
        plan: Plan | None = None
        backend = BACKENDS[self.backend]
        options: dict[str, Any] = {"cache": compile_cache()} if backend.caches else {}
        options |= backend.graph_options.get(name, {})
        if backend.runs_plans:
            plan = build.find(self.bundle, name, self.backend, sizes or {}, device=self._device)
            options = {"plan": plan.path, "weights": self.bundle.graphs[name].weights}
        fixed = sizes if backend.fixed_sizes else None
        path = self.bundle.graph(name)
        try:
            engine = engines.open(
                path, self.backend, self._threads, fixed, device=self._device, **options | self._options
            )
        except engines.EngineLoadError as error:
            if plan is None:
                raise
            raise build.unusable(self.bundle, plan, error) from error
        try:
            self._check_weights(name, engine)
            if plan is not None and plan.sha256 not in self._compared:
                build.compare_once(self.bundle, name, plan, engine)
                self._compared.add(plan.sha256)
        except BaseException:  # an interruption, too: to compare may take long
            engine.close()
            raise
        return engine

    def engine(self, name: str, sizes: Sizes | None = None) -> Engine:
        """The open engine of a graph; see `resident`."""
        return self.resident(name, sizes).engine

    def resident(self, name: str, sizes: Sizes | None = None) -> Resident:
        """The open engine of a graph and what it holds; opened if need be, anew if the sizes do not fit it.

        Raises:
            UsageError: after `close`.
            BundleMismatch, engines.EngineError: as `open`.
        """
        if self._closed:
            raise UsageError(
                "the runtime is closed", "close() was called on it", "open another: Runtime.open"
            )
        if name in self._residents and not self._fits(name, sizes or {}):
            self.free(name)
        if name not in self._residents:
            self._residents[name] = Resident(self.open(name, sizes))
        return self._residents[name]

    def find(self, name: str) -> Resident | None:
        """The engine of a graph if it is open."""
        return self._residents.get(name)

    def free(self, name: str) -> None:
        """Close a graph, if it is open."""
        if name in self._residents:
            self._residents.pop(name).engine.close()

    def close(self) -> None:
        """Close all for good; closing twice does nothing."""
        self._closed = True
        for name in list(self._residents):
            self.free(name)

    def _check_weights(self, name: str, engine: Engine) -> None:
        """Refuse a graph whose replaceable constants are not those of the manifest."""
        declared = {spec.name: spec for spec in self.bundle.graphs[name].weights}
        actual = {spec.name: spec for spec in engine.weights}
        for key in sorted(declared.keys() | actual.keys()):
            if declared.get(key) != actual.get(key):
                raise BundleMismatch(
                    f"the weights in {name} of the bundle {self.bundle.name} are not those of its manifest",
                    f"it has {spec_text(actual.get(key))}; the manifest says {spec_text(declared.get(key))}",
                    EXPORT_AGAIN,
                )

    def _fits(self, name: str, sizes: Sizes) -> bool:
        """Whether the open engine takes these sizes: it was opened for them, or for any."""
        made_for = {spec.name: spec.shape for spec in self._residents[name].engine.inputs}
        return all(
            not isinstance(fixed, int) or fixed == sizes.get(size, fixed)
            for spec in self.bundle.graphs[name].inputs
            for size, fixed in zip(spec.shape, made_for.get(spec.name, ()), strict=False)
            if isinstance(size, str)
        )


def _backend(bundle: Bundle, asked: str) -> str:
    """The name of the backend for the bundle: one that can refit, if the LoRA enters by refit."""
    name = engines.resolve(asked)
    if bundle.adapt != "refit" or BACKENDS[name].refits:
        return name
    if asked == "auto":
        return DEFAULT
    raise BundleMismatch(
        f"the backend {name!r} cannot take the LoRA of the bundle {bundle.name}",
        f"its LoRA enters by refit, and {name} makes constants of it; {listed(names('refits'))} do not",
        "export the bundle with --adapt inputs, or use another backend",
    )


def _check_device(backend: str, device: int) -> None:
    """Refuse a device other than 0 for a backend without GPUs; the others check that it exists."""
    if device and not BACKENDS[backend].nvidia:
        gpus = listed(names("nvidia"))
        why = f"the backend {backend!r} runs on the processor"
        raise UsageError(f"the device is {device}", why, f"leave it out, or use a backend of GPUs: {gpus}")


def compile_cache() -> Path | None:
    """This user's folder for compiled graphs, in $HYPERRT_HOME or the XDG cache; made if it is not there.

    None where it cannot be made, is a link, or where others may write: what lies there is run.
    """
    try:
        folder = private_folder.base_folder() / "compiled"
        private_folder.make_folder(folder)
        with private_folder.open_folder(folder):
            return folder
    except (OSError, HyperRTError):  # no home, a file in the way, a disk that is full or read-only
        return None
