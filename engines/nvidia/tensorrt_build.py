"""Compiles a graph for TensorRT: ONNX to a plan, in a process of its own.

The compiler takes minutes and gigabytes, and may be killed for them or crash: none of that reaches the
program that asked. TensorRT-RTX compiles for GPUs that are not there (`target`), on a machine that has none;
TensorRT for the one that is.

    python -m hyperrt.engines.nvidia.tensorrt_build

takes a `Recipe` as JSON on stdin, and says one JSON object a line on stdout: {"done": share} while it works,
then {"built": {…}} or {"error": {…}}.

Strongly typed: the precision is that of the graph. A size that the graph leaves open is fixed (`sizes`) or
has a range (`ranges`); a plan with weights that can be replaced (`refit`) must have all sizes fixed.
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
from hyperrt.engines.onnx_file import Dims, tensor_dims

RTX = "tensorrt_rtx"
CURRENT = "current"  # the GPU of this machine
BROKEN_REFIT = "11.3."  # TensorRT 11.3 may drop a bias of a plan that can be refitted (its release notes)
Ranges = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Recipe:
    """What is compiled, and how.

    Attributes:
        onnx: the graph's file, its data beside it.
        output: where the plan is written.
        vendor: "tensorrt" or "tensorrt_rtx".
        target: "sm89", or "current" for the GPU of this machine.
        sizes: name of an open size -> its value.
        ranges: name of another open size -> (least, usual, most).
        refit: names of the weights that can be replaced.
        timing: file that keeps how fast kernels were, for the next compilation (TensorRT alone).
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
    """How it went.

    Attributes:
        seconds: parsing, compiling and writing.
        peak_bytes: of memory, of the compiling process.
        plan_bytes: size of the plan.
        inputs: names of the plan's inputs.
    """

    seconds: float
    peak_bytes: int
    plan_bytes: int
    inputs: tuple[str, ...]


def build(recipe: Recipe, progress: Callable[[float], None] | None = None) -> Built:
    """Compile in a child process; `progress` is told the share that is done.

    Raises:
        EngineLoadError: the graph has an operator that is not supported, or needs what the target lacks; a
            weight cannot be refitted; or there is no such target.
        EngineInputError: a size is open and has no range.
        EngineMemoryError: the compiler ran out of memory, or the system killed it.
        EngineError: it crashed, or the vendor's package does not start.
    """
    command = [sys.executable, "-m", "hyperrt.engines.nvidia.tensorrt_build"]
    home = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([home, os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            return _follow(child, recipe, progress or (lambda _: None))
        finally:
            child.kill()  # after an interruption; one that has ended stays as it is


def _follow(child: subprocess.Popen[str], recipe: Recipe, progress: Callable[[float], None]) -> Built:
    """Read what the child says until it ends."""
    if child.stdin is None or child.stdout is None:
        raise EngineError("the compiler did not start", "it has no pipes")
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:  # one that dies at once is told of below
        pipe.write(json.dumps(dataclasses.asdict(recipe)))
    for line in child.stdout:
        said = json.loads(line)
        if "done" in said:
            progress(said["done"])
        elif "error" in said:
            raise ERRORS[said["error"].pop("type")](**said["error"])
        else:
            return Built(**{**said["built"], "inputs": tuple(said["built"]["inputs"])})
    raise _died(child.wait(), Path(recipe.onnx).name)


def _died(code: int, name: str) -> EngineError:
    """The child ended without a word."""
    what = f"compiling {name} failed"
    if code == -signal.SIGKILL:
        do = "end other programs, or compile on a machine with more memory and the same target"
        return EngineMemoryError(what, "the system ended the compiler, most likely for want of memory", do)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    do = "export the bundle again, which avoids what is known to crash; or report it, with the bundle"
    return EngineError(what, f"the compiler ended with {how}", do)


ERRORS = {kind.__name__: kind for kind in (EngineError, EngineInputError, EngineLoadError, EngineMemoryError)}


def main() -> None:
    """The child."""
    say = _Voice()
    recipe = Recipe(**json.load(sys.stdin))
    try:
        say(built=dataclasses.asdict(_compiled(recipe, say)))
    except EngineError as error:
        fields = {"what": error.what, "why": error.why, "do": error.do}
        say(error={"type": type(error).__name__, **fields})
    except MemoryError:
        do = "end other programs, or compile on a machine with more memory"
        what = f"compiling {Path(recipe.onnx).name} failed"
        say(error={"type": "EngineMemoryError", "what": what, "why": "memory ran out", "do": do})


class _Voice:
    """One JSON object a line on stdout, whatever the vendor's library prints there."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, **what: Any) -> None:
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()


def _compiled(recipe: Recipe, say: _Voice) -> Built:
    from hyperrt.engines.nvidia.tensorrt import Log

    began = time.perf_counter()
    try:
        trt = importlib.import_module(recipe.vendor)
    except (ImportError, OSError) as error:
        raise EngineError(f"{recipe.vendor} does not start", str(error), "install it again") from error
    if recipe.refit and trt.__version__.startswith(BROKEN_REFIT) and recipe.vendor != RTX:
        why = f"a plan of {trt.__version__} that can be refitted may lack a bias (its release notes)"
        raise EngineLoadError("this TensorRT is not used for refitting", why, "install 11.4, or 11.2")
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(recipe.onnx):
        errors = [str(parser.get_error(k)) for k in range(parser.num_errors)]
        why = " ".join((errors or [log.last()])[0].split())
        raise EngineLoadError(f"{recipe.vendor} cannot read {Path(recipe.onnx).name}", why)
    config = builder.create_builder_config()
    config.progress_monitor = _monitor(trt, say)
    _set_target(trt, config, recipe)
    _set_sizes(builder, network, config, recipe, tensor_dims(Path(recipe.onnx))[0])
    _mark(trt, network, config, recipe)
    timing = _timing_cache(config, recipe)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        name, do = Path(recipe.onnx).name, "try another target, or another precision of the bundle"
        what = f"{recipe.vendor} {trt.__version__} cannot compile {name} for {recipe.target}"
        raise log.error(what, EngineLoadError, do)
    with open(recipe.output, "wb") as file:
        file.write(plan)
    if timing is not None and recipe.timing:
        _replace(Path(recipe.timing), timing.serialize())
    inputs = tuple(network.get_input(k).name for k in range(network.num_inputs))
    return Built(time.perf_counter() - began, memory.peak_bytes(), plan.nbytes, inputs)


def _set_target(trt: Any, config: Any, recipe: Recipe) -> None:
    if recipe.vendor != RTX:
        if recipe.target != CURRENT:
            why = "TensorRT compiles for the GPU of this machine alone"
            raise EngineLoadError(f"the target is {recipe.target!r}", why, "leave --target out")
        return
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items()}
    wanted = known.get(recipe.target.lower())
    if wanted is None or recipe.target.lower() == "none":
        why = f"TensorRT-RTX {trt.__version__} knows {', '.join(sorted(set(known) - {'none'}))}"
        raise EngineLoadError(f"there is no target {recipe.target!r}", why, "name one of them: --target sm89")
    config.num_compute_capabilities = 1
    config.set_compute_capability(wanted, 0)


def _set_sizes(builder: Any, network: Any, config: Any, recipe: Recipe, dims: Mapping[str, Dims]) -> None:
    """Fix the open sizes, and give the others their range."""
    profile = builder.create_optimization_profile()
    ranged = False
    for k in range(network.num_inputs):
        tensor = network.get_input(k)
        named = dims[tensor.name]
        shape = [recipe.sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in named]
        if all(isinstance(dim, int) for dim in shape):
            tensor.shape = shape
            continue
        tensor.shape = [-1 if isinstance(dim, str) else dim for dim in shape]
        missing = [dim for dim in shape if isinstance(dim, str) and dim not in recipe.ranges]
        if missing:
            why = f"the input {tensor.name!r} has it"
            raise EngineInputError(f"the size {missing[0]!r} is open", why, "fix it, or give its range")
        ranges = [recipe.ranges[dim] if isinstance(dim, str) else (dim, dim, dim) for dim in shape]
        profile.set_shape(tensor.name, *zip(*ranges, strict=True))  # least, usual, most
        ranged = True
    if ranged and recipe.refit:
        why = "TensorRT has no second profile for weights that change"
        raise EngineInputError("a plan that can be refitted has no open sizes", why, "fix them")
    if ranged:
        config.add_optimization_profile(profile)


def _mark(trt: Any, network: Any, config: Any, recipe: Recipe) -> None:
    """Let the LoRA alone be refitted: what is marked costs fusions."""
    for name in recipe.refit:
        if not network.mark_weights_refittable(name):
            why = "the graph has no weight of that name, or it was folded into another"
            raise EngineLoadError(f"the weight {name!r} cannot be refitted", why, "export the bundle again")
    if recipe.refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)


def _timing_cache(config: Any, recipe: Recipe) -> Any:
    """What an earlier compilation measured; TensorRT-RTX measures nothing, and would ask for a GPU."""
    if recipe.vendor == RTX or recipe.timing is None:
        return None
    known = Path(recipe.timing).read_bytes() if Path(recipe.timing).is_file() else b""
    cache = config.create_timing_cache(known)
    config.set_timing_cache(cache, False)
    return cache


def _replace(path: Path, content: Any) -> None:
    """Write aside and rename: another compilation may read the file, and this one may be killed."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)


def _monitor(trt: Any, say: _Voice) -> Any:
    """Tells the share that is done of TensorRT's outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.outermost:
                say(done=min(1.0, (step + 1) / self.outermost[phase]))
            return True

        def phase_finish(self, phase: str) -> None:
            self.outermost.pop(phase, None)

    return Monitor()


if __name__ == "__main__":
    main()
