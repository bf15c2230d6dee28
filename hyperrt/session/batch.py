"""The pictures in flight: requests join and leave between steps, and all their rows share one engine call.

image = request by request, pair by pair, picture by picture;  row = branch * images + image.
gate[row] is the strength of the LoRA on a row, 0 on rows of the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.engines import forks
from hyperrt.engines.dlpack import DeviceArray, concatenate
from hyperrt.errors import UsageError
from hyperrt.lora.subject import only_subject
from hyperrt.sampling.loop import Feeds, Trajectory, initial_noise, noise_generators
from hyperrt.sampling.request import Request, Row
from hyperrt.session.adapter import put_lora
from hyperrt.session.conditioning import Conditioning, lora_subjects
from hyperrt.session.graphs import Graphs
from hyperrt.session.resident import Resident

ARRANGEMENT = "rows"  # the name under which the denoiser holds an Arrangement


@dataclass(frozen=True)
class Arrangement:
    """What the denoiser holds for a batch, beside the LoRA.

    Attributes:
        rows: [branches x pairs] conditioning, branch-major, over the pairs of all requests.
        counts: [pairs] pictures of each pair.
        weights: [branches] weight of each branch in the guidance.
    """

    rows: tuple[Row, ...]
    counts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def repeats(self) -> tuple[int, ...]:
        """[branches x pairs] rows of the UNet batch that have each row's conditioning."""
        return self.counts * len(self.weights)


class Batch:
    """Pictures on their way, of one request or several.

    The requests have the same solver, steps and guidance, and are at the same step: the step graph of bundle
    format 1 takes one timestep and one set of weights for a call.

    Args:
        graphs: of an open bundle.
        conditioning: of the same graphs.
        lock: held during a step; batches of the same graphs share it.
    """

    def __init__(self, graphs: Graphs, conditioning: Conditioning, lock: forks.Lock) -> None:
        self._graphs = graphs
        self._conditioning = conditioning
        self._lock = lock
        self._requests: list[Request] = []
        self._arrangement: Arrangement | None = None
        self._version = 0  # of the denoiser, when this batch was last bound
        self._trajectory: Trajectory | None = None

    @property
    def trajectory(self) -> Trajectory:
        """The latents of all pictures; `denoise(batch.step, batch.trajectory)` is the loop.

        Raises:
            UsageError: no request has joined yet.
        """
        if self._trajectory is None:
            raise UsageError("the batch is empty", "a step needs pictures", "add a request first")
        return self._trajectory

    def add(self, request: Request) -> None:
        """Let all pictures of a request join the batch.

        Raises:
            UsageError: it is in the batch, or has another solver, other steps or other guidance than the
                batch, or the batch is at another step; or its subject is another one, and the bundle takes
                one at a time (`refit`).
        """
        if any(each is request for each in self._requests):
            why = "a batch holds each request once"
            raise UsageError("the request is in the batch already", why, "resolve another: Runtime.request")
        requests = [*self._requests, request]
        if self._graphs.bundle.adapt == "refit":
            only_subject(pair.subject for each in requests for pair in each.pairs)
        joining = self._start(request)
        if not self._requests:
            self._trajectory = joining
        else:
            self._check_fits(request)
            self.trajectory.join(joining)
        self._arrange(requests)

    def remove(self, request: Request) -> None:
        """Let all pictures of a request leave the batch.

        Raises:
            ValueError: it is not in the batch.
        """
        images = self.images_of(request)
        self.trajectory.drop(images)
        self._arrange([each for each in self._requests if each is not request])

    def images_of(self, request: Request) -> slice:
        """Where the pictures of a request lie along the first axis of the latents.

        Raises:
            ValueError: it is not in the batch.
        """
        index = next((k for k, each in enumerate(self._requests) if each is request), None)
        if index is None:
            raise ValueError("the request is not in the batch")
        start = sum(len(each.pairs) * each.n for each in self._requests[:index])
        return slice(start, start + len(request.pairs) * request.n)

    def step(self, feeds: Feeds) -> Feeds:
        """Run the step graph; its results stay where they were computed, for the next step to read.

        Args:
            feeds: see `denoise`.

        Raises:
            NumericError: the conditioning is NaN or infinite.
            engines.EngineError: the backend failed.
        """
        with self._lock:
            denoiser = self._graphs.find("denoiser")
            if denoiser is None or denoiser.version != self._version:  # new pictures, or another batch ran
                denoiser = self.bind()
            return denoiser.engine.run(feeds, host=False)

    def bind(self) -> Resident:
        """Put everything into the denoiser that stays the same over the loop, unless it is there.

        Raises:
            As `step`.
        """
        with self._lock:
            arrangement = self._arrangement
            if arrangement is None:
                raise UsageError("the batch is empty", "a step needs pictures", "add a request first")
            denoiser = self._graphs.find("denoiser")
            if denoiser is None or not denoiser.holds(ARRANGEMENT, arrangement):
                denoiser = self._put(arrangement, denoiser)
            self._version = denoiser.version
            return denoiser

    def _put(self, arrangement: Arrangement, denoiser: Resident | None) -> Resident:
        if denoiser is not None:
            denoiser.forget(ARRANGEMENT)  # conditioning may write to the arrays that the denoiser reads
        # The conditioning first: with low memory its engines are closed before the denoiser is opened.
        conditioning = self._conditioning.of(arrangement.rows)
        repeated = zip(arrangement.rows, arrangement.repeats, strict=True)
        rows = [row for row, count in repeated for _ in range(count)]
        subjects = lora_subjects(rows)
        sizes = {
            "images": sum(arrangement.counts),
            "branches": len(arrangement.weights),
            "rows": len(rows),
            "subjects": len(subjects),
        }
        denoiser = self._graphs.resident("denoiser", sizes)
        bundle, graph = self._graphs.bundle, self._graphs.bundle.graphs["denoiser"]
        put_lora(denoiser, "lora_q", bundle.layout, graph.adapt, subjects)
        inputs: dict[str, Any] = {
            "guidance": np.array(arrangement.weights, np.float32),
            "gate": np.array([row.gate for row in rows], np.float32),
        }
        inputs |= {
            name: _repeated(value, arrangement.repeats)
            for name, value in conditioning.items()
            if graph.takes(name)
        }
        engine = denoiser.engine
        denoiser.hold(ARRANGEMENT, arrangement, lambda: engine.bind(inputs, copy=False))
        return denoiser

    def _start(self, request: Request) -> Trajectory:
        """The pictures of a request before the first step."""
        latent, pairs = self._graphs.bundle.latent, len(request.pairs)
        shape = (latent.channels, latent.size, latent.size)
        noise = initial_noise(request.seed, shape, request.n) * np.float32(request.table.initial_scale)
        generators = [rng for _ in range(pairs) for rng in noise_generators(request.seed, request.n)]
        return Trajectory(request.table, np.tile(noise, (pairs, 1, 1, 1)), generators)

    def _check_fits(self, request: Request) -> None:
        first = self._requests[0]
        do = "draw it after these, or with the same solver, steps and guidance"
        if done := self.trajectory.index:
            why = f"the batch has done {done} steps, and all its pictures share a timestep"
            raise UsageError("the request cannot join the batch", why, "draw it after these")
        theirs = (request.branches, request.table.timesteps.tolist(), request.table.coefficients.tolist())
        if theirs != (first.branches, first.table.timesteps.tolist(), first.table.coefficients.tolist()):
            why = "all pictures of a batch share the solver, the steps and the guidance"
            raise UsageError("the request cannot join the batch", why, do)

    def _arrange(self, requests: list[Request]) -> None:
        """Take these for the requests of the batch; the next step binds their rows."""
        self._requests, self._version = requests, 0
        if not requests:
            self._arrangement = None
            return
        per_request = [request.rows for request in requests]
        rows = tuple(
            row
            for branch in range(len(requests[0].branches))
            for request, rows in zip(requests, per_request, strict=True)
            for row in rows[branch * len(request.pairs) : (branch + 1) * len(request.pairs)]
        )
        counts = tuple(request.n for request in requests for _ in request.pairs)
        self._arrangement = Arrangement(rows, counts, requests[0].weights)


def _repeated(array: Any, repeats: tuple[int, ...]) -> NDArray[Any] | DeviceArray:
    """An array with each entry of its first axis as often as `repeats` says; itself if each is there once.

    Copied only if need be: SDXL's keys and values are 190 MB.
    """
    if set(repeats) == {1}:
        return array  # type: ignore[no-any-return]
    if isinstance(array, DeviceArray):
        return concatenate([array[k : k + 1] for k, count in enumerate(repeats) for _ in range(count)])
    return np.repeat(array, repeats, axis=0)
