"""Compiles an ONNX graph to a TensorRT plan, in a child process.

The compiler takes minutes and gigabytes, and may crash or be killed: that then ends only the child.
TensorRT-RTX compiles for any GPU (`target`), also on a machine without one; TensorRT compiles for the GPU of
the machine.

    python -m hyperrt.engines.nvidia.tensorrt_build

reads a `BuildRequest` as JSON from stdin, and writes one JSON object per line to stdout: {"done": share}
while it works, then {"built": {…}} or {"error": {…}}.

Networks are strongly typed: the graph determines the precision.  An open size of the graph is fixed (`sizes`)
or has a range (`ranges`); a plan with refittable weights (`refit`) must have all sizes fixed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperrt.engines import memory
from hyperrt.engines.errors import EngineError, EngineInputError, EngineLoadError, EngineMemoryError
from hyperrt.engines.nvidia.tensorrt_log import RTX, Log
from hyperrt.engines.onnx_file import Dims, tensor_dims

CURRENT = "current"  # the GPU of this machine
BROKEN_REFIT = "11.3."  # TensorRT 11.3 may drop a bias of a refittable plan (its release notes)
Ranges = Mapping[str, tuple[int, int, int]]  # name of a size -> (min, opt, max)


@dataclass(frozen=True)
class BuildRequest:
    """What to compile, and how.

    Attributes:
        onnx: the graph's file; its external data lies beside it.
        output: the file for the plan.
        vendor: "tensorrt" or "tensorrt_rtx".
        target: such as "sm89", or "current" for the GPU of this machine.
        sizes: name of an open size -> its fixed value.
        ranges: name of another open size -> (min, opt, max) of the optimization profile.
        refit: names of the refittable weights.
        timing: file of the timing cache, which speeds up the next compilation (only TensorRT).
    """

    onnx: str
    output: str
    vendor: str
    target: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ranges: Ranges = dataclasses.field(default_factory=dict)
    refit: tuple[str, ...] = ()
    timing: str | None = None


@dataclass(frozen=True)
class Built:
    """Facts about a compilation.

    Attributes:
        seconds: for parsing, compiling and writing.
        peak_bytes: peak memory of the child process.
        plan_bytes: size of the plan.
        inputs: names of the plan's inputs.
    """

    seconds: float
    peak_bytes: int
    plan_bytes: int
    inputs: tuple[str, ...]


def build(request: BuildRequest, progress: Callable[[float], None] | None = None) -> Built:
    """Compile in a child process; `progress` is called with the share done, from 0 to 1.

    Raises:
        EngineLoadError: an operator is not supported, by TensorRT or on the target; a weight cannot be
            refitted; or there is no such target.
        EngineInputError: an open size has no range.
        EngineMemoryError: the compiler ran out of memory, or the system killed it.
        EngineError: the compiler crashed, or the vendor's package does not start.
    """
    command = [sys.executable, "-m", "hyperrt.engines.nvidia.tensorrt_build"]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            return _follow(child, request, progress or (lambda _: None))
        finally:
            child.kill()  # after an interruption; does nothing to a child that has ended


def _follow(child: subprocess.Popen[str], request: BuildRequest, progress: Callable[[float], None]) -> Built:
    """Send the request to the child, and read its messages until it ends."""
    if child.stdin is None or child.stdout is None:
        raise EngineError("the compiler did not start", "it has no pipes")
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:  # a dead child is reported below
        pipe.write(json.dumps(dataclasses.asdict(request)))
    for line in child.stdout:
        message = json.loads(line)
        if "done" in message:
            progress(message["done"])
        elif "error" in message:
            raise ERRORS[message["error"].pop("type")](**message["error"])
        else:
            return Built(**{**message["built"], "inputs": tuple(message["built"]["inputs"])})
    raise _died(child.wait(), Path(request.onnx).name)


def _died(code: int, name: str) -> EngineError:
    """The error of a child that ended without a result."""
    what = f"compiling {name} failed"
    if code == -signal.SIGKILL:
        why = "the system killed the compiler, most likely because memory ran out"
        do = "end other programs, or compile on a machine with more memory and the same target"
        return EngineMemoryError(what, why, do)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    do = "export the bundle again, which avoids known crashes; or report it, with the bundle"
    return EngineError(what, f"the compiler ended with {how}", do)


ERRORS = {kind.__name__: kind for kind in (EngineError, EngineInputError, EngineLoadError, EngineMemoryError)}


def main() -> None:
    """Entry point of the child process."""
    send = _Sender()
    request = BuildRequest(**json.load(sys.stdin))
    try:
        send(built=dataclasses.asdict(_compile(request, send)))
    except EngineError as error:
        fields = {"what": error.what, "why": error.why, "do": error.do}
        send(error={"type": type(error).__name__, **fields})
    except MemoryError:
        do = "end other programs, or compile on a machine with more memory"
        what = f"compiling {Path(request.onnx).name} failed"
        send(error={"type": "EngineMemoryError", "what": what, "why": "memory ran out", "do": do})


class _Sender:
    """Writes one JSON object per line to stdout, and redirects what the vendor's library prints to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def _compile(request: BuildRequest, send: _Sender) -> Built:
    start = time.perf_counter()
    try:
        trt = importlib.import_module(request.vendor)
    except (ImportError, OSError) as error:
        raise EngineError(f"{request.vendor} does not start", str(error), "install it again") from error
    if request.refit and trt.__version__.startswith(BROKEN_REFIT) and request.vendor != RTX:
        why = f"refittable plans of {trt.__version__} may lack a bias (its release notes)"
        raise EngineLoadError("this TensorRT is not used for refitting", why, "install 11.4, or 11.2")
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(request.onnx):
        errors = [str(parser.get_error(k)) for k in range(parser.num_errors)]
        why = " ".join((errors or [log.cause()])[0].split())
        raise EngineLoadError(f"{request.vendor} cannot read {Path(request.onnx).name}", why)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, send)
    _set_target(trt, config, request)
    _set_sizes(builder, network, config, request, tensor_dims(Path(request.onnx))[0])
    _mark_refittable(trt, network, config, request)
    timing = _timing_cache(config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        name, do = Path(request.onnx).name, "try another target, or another precision of the bundle"
        what = f"{request.vendor} {trt.__version__} cannot compile {name} for {request.target}"
        raise log.error(what, EngineLoadError, do)
    with open(request.output, "wb") as file:
        file.write(plan)
    if timing is not None and request.timing:
        _replace(Path(request.timing), timing.serialize())
    inputs = tuple(network.get_input(k).name for k in range(network.num_inputs))
    return Built(time.perf_counter() - start, memory.peak_bytes(), plan.nbytes, inputs)


def _set_target(trt: Any, config: Any, request: BuildRequest) -> None:
    if request.vendor != RTX:
        if request.target != CURRENT:
            why = "TensorRT compiles only for the GPU of this machine"
            raise EngineLoadError(f"the target is {request.target!r}", why, "leave --target out")
        return
    members = trt.ComputeCapability.__members__.items()
    targets = {name.lower(): value for name, value in members if name.lower() != "none"}
    if request.target.lower() not in targets:
        why = f"TensorRT-RTX {trt.__version__} has the targets {', '.join(sorted(targets))}"
        raise EngineLoadError(f"there is no target {request.target!r}", why, "choose one: --target sm89")
    config.num_compute_capabilities = 1
    config.set_compute_capability(targets[request.target.lower()], 0)


def _set_sizes(
    builder: Any, network: Any, config: Any, request: BuildRequest, dims: Mapping[str, Dims]
) -> None:
    """Fix open sizes, or give them a range in an optimization profile."""
    profile = builder.create_optimization_profile()
    has_ranges = False
    for k in range(network.num_inputs):
        tensor = network.get_input(k)
        shape = [request.sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims[tensor.name]]
        if all(isinstance(dim, int) for dim in shape):
            tensor.shape = shape
            continue
        tensor.shape = [-1 if isinstance(dim, str) else dim for dim in shape]
        missing = [dim for dim in shape if isinstance(dim, str) and dim not in request.ranges]
        if missing:
            why = f"the input {tensor.name!r} has it"
            raise EngineInputError(f"the size {missing[0]!r} is open", why, "fix it, or give its range")
        ranges = [request.ranges[dim] if isinstance(dim, str) else (dim, dim, dim) for dim in shape]
        profile.set_shape(tensor.name, *zip(*ranges, strict=True))  # min, opt, max
        has_ranges = True
    if has_ranges and request.refit:
        why = "TensorRT has no second profile for weights that change"
        raise EngineInputError("a refittable plan has no open sizes", why, "fix them")
    if has_ranges:
        config.add_optimization_profile(profile)


def _mark_refittable(trt: Any, network: Any, config: Any, request: BuildRequest) -> None:
    """Mark only the LoRA as refittable, because marked weights prevent fusions."""
    for name in request.refit:
        if not network.mark_weights_refittable(name):
            why = "the graph has no weight of that name, or it was folded into another"
            raise EngineLoadError(f"the weight {name!r} cannot be refitted", why, "export the bundle again")
    if request.refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)


def _timing_cache(config: Any, request: BuildRequest) -> Any:
    """The timings of an earlier compilation; TensorRT-RTX does not measure, and would need a GPU for it."""
    if request.vendor == RTX or request.timing is None:
        return None
    timings = Path(request.timing).read_bytes() if Path(request.timing).is_file() else b""
    cache = config.create_timing_cache(timings)
    config.set_timing_cache(cache, False)
    return cache


def _replace(path: Path, content: Any) -> None:
    """Write a temporary file and rename it: another process may read the file, and this one may be killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _monitor(trt: Any, send: _Sender) -> Any:
    """A progress monitor that sends the share done of TensorRT's outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.outermost:
                send(done=min(1.0, (step + 1) / self.outermost[phase]))
            return True

        def phase_finish(self, phase: str) -> None:
            self.outermost.pop(phase, None)

    return Monitor()


if __name__ == "__main__":
    main()
