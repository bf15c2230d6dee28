"""The runtime: photos and a prompt to pictures, on the graphs of a bundle.

photos -> LoRA                once per subject   image_encoder, weight_decoder
prompts -> context (K, V)     once per prompt    text_encoder, context
noise -> latents              once per step      denoiser: [uncond | subject | generic] rows, guidance, solver
latents -> pixels             once per picture   vae_decoder

Source: arXiv 2511.03156, HM-CFG (eq. 20); a subject's rows and base rows share one call.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from hyperrt import engines
from hyperrt.arguments import checked
from hyperrt.bundle import memory
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines import forks
from hyperrt.errors import UsageError
from hyperrt.lora.combine import combined_layout
from hyperrt.lora.subject import Subject
from hyperrt.lora.subject_file import load_subject
from hyperrt.photos.load import preprocess
from hyperrt.photos.read import Photos, read_photos
from hyperrt.sampling.loop import Step, denoise
from hyperrt.sampling.options import RANDOM, SamplingOptions
from hyperrt.sampling.prompts import noun_of_trigger
from hyperrt.sampling.request import Request, as_pairs, is_single, resolve
from hyperrt.session.batch import Batch
from hyperrt.session.conditioning import conditioning_for
from hyperrt.session.decode import Pictures, decode_picture
from hyperrt.session.finite import check_finite
from hyperrt.session.graphs import Graphs
from hyperrt.session.personalizer import Personalizer, origin

log = logging.getLogger("hyperrt")

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of one prompt.

    Attributes:
        images: [n, H, W, 3] uint8.
        seeds: [n]; picture k alone is `generate(..., seed=seeds[k], n=1)`.
        recipe: what reproduces the pictures (`recipe.options_of`), as JSON values; `seed` is the first one's.
        latents: [n, C, h, w] float32, as the decoder got them.
    """

    images: Pictures
    seeds: tuple[int, ...]
    recipe: Mapping[str, Any]
    latents: Floats

    def recipe_of(self, k: int) -> dict[str, Any]:
        """The recipe of picture k alone."""
        return {**self.recipe, "seed": self.seeds[k]}


class Runtime:
    """An open bundle.  Threads may share it: engine calls take turns, and no call sees another's subject.

    Use `Runtime.open`; close it, or use it in a `with` statement, to free the engines.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        threads: int | None,
        low_memory: bool,
        backend_options: Mapping[str, Any] | None,
        device: int = 0,
    ) -> None:
        self.bundle = bundle
        self._graphs = Graphs(bundle, backend, threads, backend_options, device)
        self.backend = self._graphs.backend
        self._low_memory = low_memory
        self._conditioning = conditioning_for(self._graphs, low_memory)
        self._personalizer = Personalizer(self._graphs, low_memory)
        self._lock = forks.Lock()

    @classmethod
    @checked
    def open(
        cls,
        bundle: str | Path = "tiny",
        backend: str = "auto",
        threads: int | None = None,
        *,
        low_memory: bool = False,
        device: int = 0,
        backend_options: Mapping[str, Any] | None = None,
    ) -> Runtime:
        """Open a bundle; graphs are loaded when they are first needed.

        Args:
            bundle: name of a bundle in the wheel, or a folder.
            backend: one of `engines.BACKENDS`, or "auto" for the one that suits this machine.
            threads: CPU threads of one engine call; None lets the backend decide.
            low_memory: close a graph when it is no longer needed: what turns a prompt into K and V before the
                loop, the denoiser before decoding; and decode what is larger than 512 pixels in tiles.
                Saves memory, and costs the time of opening them again for the next call.
            device: which GPU, as CUDA counts those that it shows this process; for backends that run on one.
            backend_options: the backend's own, such as {"precision": "f32"} of openvino, which otherwise
                computes in bf16 where the processor does; see `open` in engines/BACKEND.py.

        Raises:
            NotFound: there is no such bundle.
            BundleError: the bundle is damaged.
            BundleMismatch: this version cannot run it.
            UsageError: an argument is not one that is taken, or `device` is not 0 and the backend runs on the
                processor.
            engines.BackendMissing: there is no such backend.
        """
        return cls(Bundle.open(bundle), backend, threads, low_memory, backend_options, device)

    @property
    def open_graphs(self) -> set[str]:
        """Names of the graphs that are open now."""
        return self._graphs.open_names

    @checked
    def personalize(
        self, images: Photos, class_noun: str | None = None, strict: bool = False, combine: str = "mean"
    ) -> Subject:
        """Turn photos of one subject into its LoRA.

        Args:
            images: a folder, a photo (a file, open or not, its bytes, an array [H, W, 3] of uint8, a PIL
                image), or a list, set or generator of these; also an array [n, H, W, 3].
            class_noun: what the subject is ("mug"), for prompts that do not say; None: the bundle's default.
            strict: refuse if one photo cannot be used, instead of leaving it out with a warning.
            combine: with several photos, "mean" averages the factors (the paper's way), "product" takes the
                LoRA closest to the average of A B, and "concat" that average itself, with a rank that can be
                saved but not drawn with.

        Raises:
            UsageError: an argument has the wrong type, or `combine` is another word.
            BadInput: no photo is left, or one is bad and `strict` is on.
            NotFound: the folder or a file does not exist.
            NumericError: the predicted weights hold NaN; with one photo on a GPU that is found when it is
                drawn.
            ResourceError: there is not enough memory.
        """
        noun = class_noun or self.bundle.prompts.default_class
        photos = read_photos(images, strict)
        layout = combined_layout(self.bundle.layout, combine, count := len(photos))
        pixels = preprocess(photos, self.bundle.preprocess)
        with self._lock:
            weights, tokens = self._personalizer.lora(pixels, combine)
        return Subject(weights, noun, count, origin(self.bundle, noun, count, combine), tokens, layout)

    @checked
    def load_subject(self, path: str | Path, partial: bool = False) -> Subject:
        """Read a LoRA file that fits this bundle: a subject file, or one of another program.

        Args:
            partial: leave out what another program's file adapts beside q, k and v of the cross-attention.

        Raises:
            NotFound, LoraError, LoraMismatch: as `subject_file.load_subject`.
        """
        shape, base, bundle = self.bundle.token_shape, self.bundle.hashes.base_model, self.bundle.reference
        subject = load_subject(path, self.bundle.layout, base, shape, partial=partial, bundle=bundle)
        rules, trigger = self.bundle.prompts, subject.metadata.get("trigger", "")
        noun = subject.class_noun or noun_of_trigger(trigger, rules.nouns, rules.default_class)
        return dataclasses.replace(subject, class_noun=noun)

    @checked
    def request(
        self,
        prompt: str | Sequence[str],
        subject: Subject | Sequence[Subject | None] | None = None,
        *,
        generic_prompt: str | None = None, negative_prompt: str = "", kappa: float | None = None,
        cfg: bool = False, guidance_scale: float | None = None, steps: int | None = None,
        solver: str | None = None, seed: int | None = None, n: int = 1, strength: float = 1.0,
        batch_size: int = 1, image_scale: float | None = None,
    ) -> Request:  # fmt: skip
        """Resolve an order for pictures, with the bundle's defaults in place of None; warnings are logged.

        Several pairs of a prompt and a subject can be drawn by one call: prompts and subjects are then
        sequences of one length. Each pair is drawn as it would be alone, with the same seeds; all options
        are shared. The rows of all pairs go through the engine together.

        Args:
            prompt: with `[V]` where the subject is named; plain text without a subject, or for the LoRA of
                another program.
            subject: from `personalize` or `load_subject`; None samples the base model with classifier-free
                guidance of scale `2 guidance_scale` (HM-CFG at kappa 0).
            generic_prompt: prompt of the generic branch; None is the prompt without the placeholder.
            negative_prompt: replaces the empty prompt of the unconditional branch.
            kappa: share of the subject in the guidance, 0 to 2; 1 is the paper.
            cfg: plain CFG of the personalised model, with the empty prompt and the subject's: no kappa.
            guidance_scale: s = w + 1; the default of CFG is twice the bundle's, which guides as strongly.
            steps: model evaluations.
            solver: one of `options.SOLVER_NAMES`.
            seed: picture k uses seed + k, whatever n and batch_size are; None or -1 chooses a random one
                (see `Request.seeds`).
            n: pictures of each pair.
            strength: factor on the LoRA; 0 leaves it out.
            image_scale: weight of the photos' image tokens beside the text (open category); 0 leaves
                them out.
            batch_size: pictures of each pair per engine call. At 1, picture k has the same bits whatever
                n is.

        Raises:
            UsageError: an argument has the wrong type or is out of range, or there are not as many subjects
                as prompts.
            BadPrompt: a prompt cannot be used, or has no placeholder although its subject is made of photos.
            LoraMismatch: a subject was made for another bundle.
        """
        seed = RANDOM if seed is None else seed
        options = SamplingOptions(
            generic_prompt=generic_prompt, negative_prompt=negative_prompt, kappa=kappa, cfg=cfg,
            guidance_scale=guidance_scale, steps=steps, solver=solver, seed=seed, n=n, strength=strength,
            batch_size=batch_size, image_scale=image_scale,
        )  # fmt: skip
        return self.resolve(prompt, subject, options)

    def resolve(
        self,
        prompt: str | Sequence[str],
        subject: Subject | Sequence[Subject | None] | None,
        options: SamplingOptions,
    ) -> Request:
        """As `request`, with the options in one object."""
        prompts, subjects = as_pairs(prompt, subject)
        request = resolve(self.bundle, self.backend, prompts, subjects, options)
        for warning in request.warnings:
            log.warning("%s", warning)
        return request

    @overload
    def generate(
        self, prompt: str, subject: Subject | None = None, *,
        generic_prompt: str | None = None, negative_prompt: str = "", kappa: float | None = None,
        cfg: bool = False, guidance_scale: float | None = None, steps: int | None = None,
        solver: str | None = None, seed: int | None = None, n: int = 1, strength: float = 1.0,
        batch_size: int = 1, image_scale: float | None = None,
    ) -> Result: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: Sequence[str], subject: Sequence[Subject | None], *,
        generic_prompt: str | None = None, negative_prompt: str = "", kappa: float | None = None,
        cfg: bool = False, guidance_scale: float | None = None, steps: int | None = None,
        solver: str | None = None, seed: int | None = None, n: int = 1, strength: float = 1.0,
        batch_size: int = 1, image_scale: float | None = None,
    ) -> list[Result]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | Sequence[str],
        subject: Subject | Sequence[Subject | None] | None = None,
        *,
        generic_prompt: str | None = None, negative_prompt: str = "", kappa: float | None = None,
        cfg: bool = False, guidance_scale: float | None = None, steps: int | None = None,
        solver: str | None = None, seed: int | None = None, n: int = 1, strength: float = 1.0,
        batch_size: int = 1, image_scale: float | None = None,
    ) -> Result | list[Result]:  # fmt: skip
        """Draw pictures of a prompt, or of several with a subject each; `request` describes the arguments.

        Raises:
            As `request` and `sample`.
        """
        request = self.request(
            prompt, subject,
            generic_prompt=generic_prompt, negative_prompt=negative_prompt, kappa=kappa, cfg=cfg,
            guidance_scale=guidance_scale, steps=steps, solver=solver, seed=seed, n=n, strength=strength,
            batch_size=batch_size, image_scale=image_scale,
        )  # fmt: skip
        results = finish(self.sample(request))
        return results[0] if is_single(prompt) else results

    @checked
    def sample(self, request: Request) -> Generator[Step, None, list[Result]]:
        """Sample step by step: a generator of `Step` that returns a `Result` for each pair of the request.

        To cancel, stop asking for the next step; nothing runs in the background. A `Step` holds the latents
        of all pictures of a call, pair by pair.

        Raises:
            ResourceError: there is not enough memory (at the first step).
            NumericError: latents or pixels hold NaN (while stepping).
            engines.EngineError: the backend failed (while stepping).
        """
        self._make_room(request)
        parts = list(request.parts())
        drawn = []
        for number, part in enumerate(parts):
            batch = self._batch(part)
            for step in denoise(batch.step, batch.trajectory):
                check_finite({"latents": step.latents}, f"the picture at step {step.index + 1}")
                index, total = number * step.total + step.index, len(parts) * step.total
                yield dataclasses.replace(step, index=index, total=total)
            latents = np.asarray(step.latents)
            check_finite({"latents": latents}, "the picture")
            drawn.append(latents.reshape(len(part.pairs), part.n, *latents.shape[1:]))
        self._close_if_low("denoiser")
        latents = np.concatenate(drawn, axis=1)  # [pairs, n, C, h, w]
        results = [
            Result(self.decode(of_pair), request.seeds, recipe, of_pair)
            for of_pair, recipe in zip(latents, request.recipes, strict=True)
        ]
        self._close_if_low("vae_decoder")
        return results

    @checked
    def prepare(self, request: Request) -> None:
        """Do everything that comes before the first step of `sample`, with the same errors: open graphs,
        encode prompts, put the subject in place. For a host that answers quickly.
        """
        self._make_room(request)
        self._batch(next(request.parts())).bind()

    def _batch(self, request: Request) -> Batch:
        batch = Batch(self._graphs, self._conditioning, self._lock)
        batch.add(request)
        return batch

    def _make_room(self, request: Request) -> None:
        """Close the graphs that make subjects, and refuse a request that does not fit into memory.

        A GPU reports by itself that it is full.
        """
        with self._lock:
            self._personalizer.free()
        backend = engines.BACKENDS[self.backend]
        if backend.nvidia:
            return
        rows = len(request.rows) * min(request.batch_size, request.n)
        low = memory.to_draw(self.bundle, rows, low_memory=True, loads_fp32=backend.loads_fp32)
        advice = fewer = "end other programs, or use a smaller batch (--batch-size)"
        if low and not self._low_memory:
            advice = f"use --low-memory (low_memory=True), which needs about {low / 1e9:.1f} GB, or {fewer}"
        needed = memory.to_draw(self.bundle, rows, self._low_memory, self.open_graphs, backend.loads_fp32)
        memory.check(needed, "drawing", advice)

    def _close_if_low(self, graph: str) -> None:
        if self._low_memory:
            with self._lock:
                self._graphs.free(graph)

    @checked
    def decode(self, latents: Floats) -> Pictures:
        """Latents [n, C, h, w] to pictures [n, H, W, 3] uint8, one at a time.

        Raises:
            UsageError: the latents are not [n, C, h, w].
            engines.EngineInputError: they have other channels than the bundle.
            NumericError: a pixel is NaN or infinite, or all pixels are the same.
        """
        if latents.ndim != 4 or not len(latents):
            raise UsageError(f"the latents are {list(latents.shape)}", "they must be [n, C, h, w]")
        pictures = []
        for k in range(len(latents)):
            with self._lock:
                pictures.append(decode_picture(self._graphs, latents[k : k + 1], self._low_memory))
        return np.concatenate(pictures)

    def close(self) -> None:
        """Free the engines; a closed runtime samples no more. Closing twice does nothing."""
        with self._lock:
            self._conditioning.forget()
            self._graphs.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finish(steps: Generator[Step, None, list[Result]]) -> list[Result]:
    """Run a sampling to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            results: list[Result] = end.value
            return results
