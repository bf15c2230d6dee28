"""The runtime: photos and a prompt to pictures, on the graphs of a bundle.

photos -> LoRA                once per subject   image_encoder, weight_decoder
prompts -> context (K, V)     once per prompt    text_encoder, context
noise -> latents              once per step      denoiser: [uncond | subject | generic] rows, guidance, solver
latents -> pixels             once per picture   vae_decoder

rows = branches x images, branch-major: row = branch * images + image.  gate[row] is the LoRA's strength
there, 0 on rows of the base model.  Engines are opened when they are first needed.
Source: arXiv 2511.03156, HM-CFG (eq. 20).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
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
from hyperrt.engines.base import Engine
from hyperrt.errors import UsageError
from hyperrt.lora.combine import combined_layout
from hyperrt.lora.subject import Subject
from hyperrt.lora.subject_file import load_subject
from hyperrt.photos.load import preprocess
from hyperrt.sampling.loop import Feeds, Step, denoise, initial_noise, noise_generators
from hyperrt.sampling.options import SamplingConfig
from hyperrt.sampling.prompts import noun_of_trigger
from hyperrt.sampling.request import Job, check, pairs_of, plan
from hyperrt.session import tiling
from hyperrt.session.conditioning import Conditioning
from hyperrt.session.graphs import Graphs
from hyperrt.session.making import Making
from hyperrt.session.personalizer import Photos, check_finite, origin, read_photos
from hyperrt.session.pictures import Pictures, check_not_flat, pictures_from_pixels

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Result:
    """What `generate` returns.

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
        self._conditioning = Conditioning(self._graphs, low_memory)
        self._making = Making(self._graphs, low_memory)
        self._bound: tuple[Any, ...] | None = None  # engine, what it was told, for how many pictures
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

    @checked
    def personalize(
        self, images: Photos, class_noun: str | None = None, strict: bool = False, combine: str = "mean"
    ) -> Subject:
        """Photos of one subject to its LoRA.

        Args:
            images: a folder, a photo (a file, open or not, its bytes, an array [H, W, 3] of uint8, a PIL
                image), or a list, set or generator of these; also an array [n, H, W, 3].
            class_noun: what the subject is ("mug"), for prompts that do not say; None: the bundle's default.
            strict: refuse if one photo cannot be used, instead of leaving it out with a warning.
            combine: of several photos take the "mean" of the factors (the paper's), the "product" closest to
                the mean of A B, or "concat": that mean itself, of a rank that can be saved, not drawn with.

        Raises:
            UsageError: an argument has the wrong type, or combine is another word.
            BadInput: no photo is left, or one is bad and `strict` is on.
            NotFound: the folder or a file does not exist.
            NumericError: the predicted weights hold NaN; of a photo on a GPU that is found when it is drawn.
            ResourceError: there is not enough memory.
        """
        noun = class_noun or self.bundle.prompts.default_class
        photos = read_photos(images, strict)
        layout = combined_layout(self.bundle.layout, combine, count := len(photos))
        pixels = preprocess(photos, self.bundle.preprocess)
        with self._lock:
            weights, tokens = self._making.lora(pixels, combine)
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
    def check(self, prompt: str, has_subject: bool, **options: Any) -> None:
        """Refuse a prompt or an option that `steps` would refuse, before photos are read for it.

        Raises:
            UsageError, BadPrompt: as `steps`.
        """
        check(self.bundle, prompt, has_subject, SamplingConfig.of(options))

    @overload
    def generate(self, prompt: str, subject: Subject | None = None, **options: Any) -> Result: ...

    @overload
    def generate(
        self, prompt: Sequence[str], subject: Sequence[Subject | None], **options: Any
    ) -> list[Result]: ...

    def generate(self, prompt: Any, subject: Any = None, **options: Any) -> Result | list[Result]:
        """Pictures of a prompt, or of several with a subject each; `steps` says more."""
        steps = self.steps(prompt, subject, **options)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                result: Result | list[Result] = done.value
                return result

    def steps(
        self,
        prompt: str | Sequence[str],
        subject: Subject | Sequence[Subject | None] | None = None,
        **options: Any,
    ) -> Generator[Step, None, Any]:
        """Sample step by step: a generator of `Step` whose return value is the `Result`.

        To cancel, stop asking for the next step; nothing runs in the background.

        Several pairs of a prompt and a subject can be drawn by one call: prompts and subjects are then
        sequences of one length, the return value is a list of `Result` in their order, and a `Step` holds the
        latents of all, pair by pair.  Each pair is drawn as it would be alone, with the same seeds; all
        options are shared.  The rows of all pairs go through the engine together.

        Args:
            prompt: with `[V]` where the subject is named; plain text without one, or for another's LoRA.
            subject: from `personalize` or `load_subject`; None samples the base model with classifier-free
                guidance of scale `2 guidance_scale` (HM-CFG at kappa 0).
            options: the fields of `SamplingConfig`, where None means the bundle's default:
                generic_prompt: prompt of the generic branch; None is the prompt without the placeholder.
                negative_prompt: replaces the empty prompt of the unconditional branch.
                kappa: share of the subject in the guidance, 0 to 2; 1 is the paper.
                cfg: plain CFG of the personalised model, with the empty prompt and the subject's: no kappa.
                guidance_scale: s = w + 1; CFG has by default twice the bundle's, and pulls as strongly.
                steps: model evaluations.
                solver: one of `options.SOLVER_NAMES`.
                seed: picture k uses seed + k, whatever n and batch_size are; None or -1 chooses a random one
                    (see `Result.seeds`).
                n: pictures of each pair.
                strength: factor on the LoRA; 0 leaves it out.
                image_scale: weight of the photos' image tokens beside the text (open category); 0 leaves
                    them out.
                batch_size: pictures of each pair per engine call. At 1, picture k has the same bits whatever
                    n is.

        Raises:
            UsageError: an argument has the wrong type or is out of range, or not as many subjects as prompts.
            BadPrompt: a prompt cannot be used, or has no placeholder although its subject is made of photos.
            LoraMismatch: a subject was made for another bundle.
            ResourceError: there is not enough memory (at the first step).
            NumericError: latents or pixels hold NaN (while stepping).
            engines.EngineError: the backend failed (while stepping).
        """
        job, several = self._plan(prompt, subject, options)
        return self._run(job, several)

    def prepare(
        self,
        prompt: str | Sequence[str],
        subject: Subject | Sequence[Subject | None] | None = None,
        **options: Any,
    ) -> None:
        """Everything before the first step of `steps`, which has the arguments and what is raised: graphs
        opened, prompts encoded, the subject in place. For a host that answers quickly.
        """
        job, _ = self._plan(prompt, subject, options)
        self._check_memory(job)
        with self._lock:
            self._bind(job, min(job.batch_size, job.n))

    def _plan(self, prompt: Any, subject: Any, options: Mapping[str, Any]) -> tuple[Job, bool]:
        """The job, and whether its prompt is a sequence; errors as `steps`."""
        asked, subjects, several = pairs_of(prompt, subject)
        return plan(self.bundle, self.backend, asked, subjects, SamplingConfig.of(options)), several

    def _run(self, job: Job, several: bool) -> Generator[Step, None, Result | list[Result]]:
        """Every batch of a job through the loop, then through the decoder."""
        self._check_memory(job)
        latent, pairs = self.bundle.latent, len(job.subjects)
        shape = (latent.channels, latent.size, latent.size)
        steps = len(job.table.timesteps)
        starts = range(0, job.n, job.batch_size)
        finished = []
        for batch, start in enumerate(starts):
            count, seed = min(job.batch_size, job.n - start), job.seed + start
            noise = initial_noise(seed, shape, count) * np.float32(job.table.initial_scale)
            generators = [one for _ in range(pairs) for one in noise_generators(seed, count)]
            noises = np.tile(noise, (pairs, 1, 1, 1))  # image = pair * count + k
            for step in denoise(self._stepper(job, count), job.table, noises, generators):
                check_finite({"latents": step.latents}, f"the picture at step {step.index + 1}")
                yield dataclasses.replace(step, index=batch * steps + step.index, total=len(starts) * steps)
            latents = np.asarray(step.latents)
            check_finite({"latents": latents}, "the picture")
            finished.append(latents.reshape(pairs, count, *shape))
        self._done_with("denoiser")
        drawn = np.concatenate(finished, axis=1)
        seeds = tuple(range(job.seed, job.seed + job.n))
        results = [
            Result(self.decode(one), seeds, recipe, one)
            for one, recipe in zip(drawn, job.recipes, strict=True)
        ]
        self._done_with("vae_decoder")
        return results if several else results[0]

    def _check_memory(self, job: Job) -> None:
        """Close what makes subjects, and refuse a job that will not fit, before anything is loaded.

        A GPU says itself when it is full.
        """
        with self._lock:
            self._making.free()
        backend = engines.BACKENDS[self.backend]
        if backend.nvidia:
            return
        rows = len(job.gate) * min(job.batch_size, job.n)
        low = memory.to_draw(self.bundle, rows, low_memory=True, loads_fp32=backend.loads_fp32)
        advice = fewer = "end other programs, or use a smaller batch (--batch-size)"
        if low and not self._low_memory:
            advice = f"use --low-memory (low_memory=True), which needs about {low / 1e9:.1f} GB, or {fewer}"
        is_open = self._graphs.open_names
        needed = memory.to_draw(self.bundle, rows, self._low_memory, is_open, backend.loads_fp32)
        memory.check(needed, "drawing", advice)

    def _stepper(self, job: Job, images: int) -> Callable[[Feeds], Feeds]:
        def step(feeds: Feeds) -> Feeds:
            with self._lock:
                # Another call may have used the denoiser since the last step.
                denoiser = self._bind(job, images)
                return denoiser.run(feeds, host=False)  # where it was computed: the next step reads it there

        return step

    def _bind(self, job: Job, images: int) -> Engine:
        """The denoiser with everything resident that stays the same over the loop.

        Args:
            images: pictures of each pair in this call.
        """
        bound, self._bound = self._bound, None  # until everything is in place
        # The context first: with `low_memory` its engines are gone before the denoiser is loaded.
        told = self._conditioning.of(job)
        rows, subjects = len(job.gate) * images, job.lora_rows(images)
        sizes = {
            "images": len(job.subjects) * images,
            "branches": len(job.branches),
            "rows": rows,
            "subjects": len(subjects),
        }
        denoiser = self._graphs.engine("denoiser", sizes)
        wanted = denoiser, job.told, job.weights.tobytes(), images
        if bound != wanted:
            self._graphs.adapter("denoiser", "lora_q").put(*subjects)
            takes = self.bundle.graphs["denoiser"].takes
            asked = {name: one for name, one in told.items() if takes(name)}
            # Copied only where it must be: SDXL's keys and values are 190 MB.
            resident = {name: x.repeat(images, 0) if images > 1 else x for name, x in asked.items()}
            gate = np.repeat(job.gate, images)
            denoiser.bind({"guidance": job.weights, "gate": gate, **resident}, copy=False)
        self._bound = wanted
        return denoiser

    def _done_with(self, graph: str) -> None:
        if self._low_memory:
            with self._lock:
                self._bound = None
                self._graphs.free(graph)

    @checked
    def decode(self, latents: Floats) -> Pictures:
        """Latents [n, C, h, w] to pictures [n, H, W, 3] uint8, one at a time.

        Raises:
            UsageError: the latents have another shape.
            NumericError: a pixel is NaN or infinite, or all pixels are the same.
        """
        if latents.ndim != 4 or not len(latents):
            raise UsageError(f"the latents are {list(latents.shape)}", "they must be [n, C, h, w]")
        pictures = []
        tile = memory.tile_of(self.bundle) if self._low_memory else None
        for k in range(len(latents)):
            with self._lock:
                one = latents[k : k + 1]
                pixels = tiling.decode(self._decode, one, tile) if tile else self._decode(one)
            check_finite({"pixels": pixels}, "the picture")
            check_not_flat(pixels)
            pictures.append(pictures_from_pixels(pixels))
        return np.concatenate(pictures)

    def _decode(self, latents: Floats) -> Floats:
        """Latents [1, C, h, w], of the whole picture or a tile, to pixels [1, 3, 8h, 8w]."""
        sizes = {"images": 1, "h": latents.shape[2], "w": latents.shape[3]}
        pixels: Floats = self._graphs.engine("vae_decoder", sizes).run({"latents": latents})["pixels"]
        return pixels

    def close(self) -> None:
        """Free the engines; a closed runtime samples no more. Closing twice does nothing."""
        with self._lock:
            self._bound = None
            self._conditioning.forget()
            self._graphs.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
