"""The runtime: photos and a prompt to pictures, on the graphs of a bundle.

photos -> LoRA                once per subject   image_encoder, weight_decoder
prompts -> context (K, V)     once per prompt    text_encoder, context
noise -> latents              once per step      denoiser: [uncond | subject | generic] rows, guidance, solver
latents -> pixels             once per picture   vae_decoder

rows = branches x images, branch-major: row = branch * images + image.  gate[row] is the LoRA's strength
there, 0 on rows of the base model.  Engines are opened when they are first needed.
Source: arXiv 2511.03156, HM-CFG (eq. 20); a subject's rows and base rows share one call.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import engines
from engines.base import Engine
from hyperrt import lora, prompts, sampling
from hyperrt.adapt import Adapter
from hyperrt.bundle import Bundle
from hyperrt.config import SamplingConfig
from hyperrt.errors import NumericError, UsageError
from hyperrt.images import preprocess
from hyperrt.job import Job, plan
from hyperrt.lora import Subject
from hyperrt.personalize import Photos, check_finite, encode_photos, predict_lora, read_photos
from hyperrt.sampling import Feeds, Step
from hyperrt.tokenizer import Tokenizer

log = logging.getLogger("hyperrt")

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Result:
    """What `generate` returns.

    Attributes:
        images: [n, H, W, 3] uint8.
        seeds: [n]; picture k alone is `generate(..., seed=seeds[k], n=1)`.
        recipe: what reproduces the pictures, as JSON values; `seed` is that of the first.
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

    def __init__(self, bundle: Bundle, backend: str, threads: int | None, keep_open: bool) -> None:
        self.bundle = bundle
        self.backend = backend
        self._threads = threads
        self._keep_open = keep_open
        self._engines: dict[str, Engine] = {}
        self._adapters: dict[str, Adapter] = {}
        self._tokenizer: Tokenizer | None = None
        self._hidden: tuple[tuple[str, ...], Floats] | None = None  # of the last prompts: texts, features
        self._context: tuple[tuple[Any, ...], Floats] | None = None  # of the last prompt: its key, K and V
        self._bound: tuple[Job, int] | None = None  # whose constants the denoiser holds, for how many images
        self._closed = False
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        bundle: str | Path = "tiny",
        backend: str = "onnxruntime",
        threads: int | None = None,
        *,
        keep_open: bool = True,
    ) -> Runtime:
        """Open a bundle; graphs are loaded when they are first needed.

        Args:
            bundle: name of a bundle in the wheel, or a folder.
            backend: one of `engines.BACKENDS`.
            threads: CPU threads of one engine call; None lets the backend decide.
            keep_open: keep what turns a prompt into K and V loaded for the next prompt; False saves memory.

        Raises:
            NotFound: there is no such bundle.
            BundleError: the bundle is damaged.
            BundleMismatch: this version cannot run it.
        """
        return cls(Bundle.open(bundle), backend, threads, keep_open)

    def personalize(self, images: Photos, class_noun: str | None = None, strict: bool = False) -> Subject:
        """Photos of one subject to its LoRA.

        Args:
            images: a folder, a file, or a sequence of files, [H, W, 3] uint8 arrays and PIL images.
            class_noun: what the subject is ("mug"), for prompts that do not say; None: the bundle's default.
            strict: refuse if one photo cannot be used, instead of leaving it out with a warning.

        Raises:
            BadInput: no photo is left, or one is bad and `strict` is on.
            NotFound: the folder or a file does not exist.
            NumericError: the predicted weights hold NaN.
        """
        noun = class_noun or self.bundle.prompts.default_class
        photos = read_photos(images, strict)
        pixels = preprocess(photos, self.bundle.preprocess)
        with self._lock:
            # One after the other, and closed at once: these two are not needed again until the next subject.
            with self._open("image_encoder") as encoder:
                features = encode_photos(pixels, encoder)
            with self._open("weight_decoder") as decoder:
                weights = predict_lora(features, decoder)
        origin = {
            "base_model": self.bundle.hashes.base_model,
            "hypernet": self.bundle.hashes.hypernet,
            "class_noun": noun,
            "photos": str(len(photos)),
            "trigger": self.bundle.prompts.token,
        }
        return Subject(weights, noun, len(photos), origin)

    def load_subject(self, path: str | Path) -> Subject:
        """Read a subject file that fits this bundle.

        Raises:
            NotFound: there is no such file.
            LoraError: it is malformed.
            LoraMismatch: it was made for another base model or layout.
        """
        return lora.load_subject(Path(path), self.bundle.layout, self.bundle.hashes.base_model)

    def generate(self, prompt: str, subject: Subject | None = None, **options: Any) -> Result:
        """Pictures of a prompt; `steps` has the arguments and what is raised."""
        steps = self.steps(prompt, subject, **options)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                result: Result = done.value
                return result

    def steps(
        self,
        prompt: str,
        subject: Subject | None = None,
        *,
        generic_prompt: str | None = None,
        negative_prompt: str = "",
        kappa: float | None = None,
        guidance_scale: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        seed: int = 0,
        n: int = 1,
        strength: float = 1.0,
        batch_size: int = 1,
    ) -> Generator[Step, None, Result]:
        """Sample step by step: a generator of `Step` whose return value is the `Result`.

        To cancel, stop asking for the next step; nothing runs in the background.  None: the bundle's default.

        Args:
            prompt: with the placeholder `[V]` where the subject is named; without a subject, plain text.
            subject: from `personalize` or `load_subject`; None samples the base model with classifier-free
                guidance of scale `2 guidance_scale` (HM-CFG at kappa 0).
            generic_prompt: prompt of the generic branch; None is the prompt without the placeholder.
            negative_prompt: replaces the empty prompt of the unconditional branch.
            kappa: share of the subject in the guidance, 0 to 2; 1 is the paper.
            guidance_scale: s = w + 1.
            steps: model evaluations.
            solver: one of `solvers.SOLVERS`.
            seed: picture k uses seed + k, whatever n and batch_size are.
            n: pictures.
            strength: factor on the LoRA; 0 is the base model.
            batch_size: pictures per engine call. At 1, picture k has the same bits whatever n is.

        Raises:
            UsageError: an argument is out of range.
            BadPrompt: a prompt cannot be used, or has no placeholder although there is a subject.
            LoraMismatch: the subject was made for another bundle.
            NumericError: latents or pixels hold NaN (while stepping).
            engines.EngineError: the backend failed (while stepping).
        """
        options = SamplingConfig(
            generic_prompt=generic_prompt,
            negative_prompt=negative_prompt,
            kappa=kappa,
            guidance_scale=guidance_scale,
            steps=steps,
            solver=solver,
            seed=seed,
            n=n,
            strength=strength,
            batch_size=batch_size,
        )
        return self._run(plan(self.bundle, self.backend, prompt, subject, options))

    def _run(self, job: Job) -> Generator[Step, None, Result]:
        """Every batch of a job through the loop, then through the decoder."""
        latent = self.bundle.latent
        shape = (latent.channels, latent.size, latent.size)
        steps = len(job.table.timesteps)
        starts = range(0, job.n, job.batch_size)
        finished = []
        for batch, start in enumerate(starts):
            count, seed = min(job.batch_size, job.n - start), job.seed + start
            noise = sampling.initial_noise(seed, shape, count) * np.float32(job.table.initial_scale)
            generators = sampling.noise_generators(seed, count)
            for step in sampling.denoise(self._stepper(job, count), job.table, noise, generators):
                check_finite({"latents": step.latents}, f"the picture at step {step.index + 1}")
                latents = step.latents
                yield dataclasses.replace(step, index=batch * steps + step.index, total=len(starts) * steps)
            finished.append(latents)
        latents = np.concatenate(finished)
        return Result(self.decode(latents), tuple(range(job.seed, job.seed + job.n)), job.recipe, latents)

    def _stepper(self, job: Job, images: int) -> Callable[[Feeds], Feeds]:
        def step(feeds: Feeds) -> Feeds:
            with self._lock:
                # Another call may have used the denoiser since the last step.
                denoiser = self._bind(job, images)
                return denoiser.run(feeds)

        return step

    def _bind(self, job: Job, images: int) -> Engine:
        """The denoiser with everything resident that stays the same over the loop."""
        # The context first: with `keep_open` off its engines are gone before the denoiser is loaded.
        context = self._context_of(job)
        denoiser = self._engine("denoiser")
        if self._bound != (job, images):
            self._bound = None
            self._adapter("denoiser", "lora_q").put(job.subject)
            denoiser.bind(
                {
                    "guidance": job.weights,
                    "context": np.repeat(context, images, axis=0),
                    "gate": np.repeat(job.gate, images),
                }
            )
            self._bound = (job, images)
        return denoiser

    def _context_of(self, job: Job) -> Floats:
        """K and V of every cross-attention [branches, L, W], computed once per prompt and subject."""
        key = (job.texts, job.gate.tobytes(), job.subject)
        if self._context is None or self._context[0] != key:
            hidden = self._hidden_states(job.texts)
            self._adapter("context", "lora_kv").put(job.subject)
            context = self._engine("context").run({"hidden_states": hidden, "gate": job.gate})["context"]
            self._done_with("context")
            check_finite({"context": context}, "what the prompt says")
            self._context = key, context
        return self._context[1]

    def _hidden_states(self, texts: tuple[str, ...]) -> Floats:
        """Text features [branches, L, D]; those of the last prompts are kept for the next subject."""
        if self._hidden is None or self._hidden[0] != texts:
            ids = self._token_ids(texts)
            hidden = self._engine("text_encoder").run({"input_ids": ids})["hidden_states"]
            self._done_with("text_encoder")
            self._hidden = texts, hidden
        return self._hidden[1]

    def _token_ids(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids [texts, L]; what does not fit is logged as a warning."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.bundle.tokenizer, self.bundle.prompts.max_tokens)
        encoded = [self._tokenizer.encode(text) for text in texts]
        longest = max((one.dropped for one in encoded), key=len)
        if longest:
            most = self.bundle.prompts.max_tokens
            log.warning("prompt cut to %d tokens; dropped: %s", most, prompts.shortened(longest))
        return np.stack([one.ids for one in encoded])

    def decode(self, latents: Floats) -> Pictures:
        """Latents [n, C, h, w] to pictures [n, H, W, 3] uint8, one at a time.

        Raises:
            NumericError: a pixel is NaN or infinite, or all pixels are the same.
        """
        pictures = []
        for k in range(len(latents)):
            with self._lock:
                pixels = self._engine("vae_decoder").run({"latents": latents[k : k + 1]})["pixels"]
            check_finite({"pixels": pixels}, "the picture")
            _check_not_flat(pixels)
            pictures.append(pictures_from_pixels(pixels))
        return np.concatenate(pictures)

    def _open(self, graph: str) -> Engine:
        return engines.open(self.bundle.graph(graph), self.backend, threads=self._threads)

    def _engine(self, graph: str) -> Engine:
        if self._closed:
            raise UsageError(
                "the runtime is closed", "close() was called on it", "open another: Runtime.open"
            )
        if graph not in self._engines:
            self._engines[graph] = self._open(graph)
        return self._engines[graph]

    def _adapter(self, graph: str, name: str) -> Adapter:
        engine = self._engine(graph)
        if graph not in self._adapters:
            self._adapters[graph] = Adapter(engine, name, self.bundle.layout, self.bundle.adapt)
        return self._adapters[graph]

    def _done_with(self, graph: str) -> None:
        if not self._keep_open:
            self._adapters.pop(graph, None)
            self._engines.pop(graph).close()

    def close(self) -> None:
        """Free the engines; a closed runtime samples no more. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            self._hidden = self._context = self._bound = None
            self._adapters.clear()
            while self._engines:
                self._engines.popitem()[1].close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_not_flat(pixels: Floats) -> None:
    """Refuse pixels [1, 3, H, W] of one colour: a black picture is how overflow in a decoder shows."""
    if not np.ptp(np.clip(pixels, -1, 1), axis=(2, 3)).any():
        raise NumericError(
            "the picture is all of one colour",
            "every pixel came out of the decoder the same, or beyond black or white",
            "try a lower guidance scale or another seed; if it stays, check the bundle: hyperrt doctor",
        )


def pictures_from_pixels(pixels: Floats) -> Pictures:
    """Pixels [n, 3, H, W] in [-1, 1] to pictures [n, H, W, 3] uint8; what lies outside is clipped."""
    scaled = np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))
