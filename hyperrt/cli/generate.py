"""`hyperrt generate` and `hyperrt personalize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hyperrt import files
from hyperrt.cli import picture_files
from hyperrt.cli import recipe as cli_recipe
from hyperrt.cli.configs import STDOUT, GenerateConfig, PersonalizeConfig
from hyperrt.cli.output import Output
from hyperrt.errors import UsageError
from hyperrt.lora.peft_config import PEFT_CONFIG
from hyperrt.lora.subject import Subject
from hyperrt.runtime import Runtime
from hyperrt.sampling import recipe
from hyperrt.sampling.request import Request, blank_subject, noun_in, resolve


def generate(config: GenerateConfig, output: Output) -> None:
    """Draw pictures of a prompt, with photos or a subject file, and write each as soon as it is drawn."""
    to_stdout = config.output == STDOUT
    if to_stdout and output.json:
        raise UsageError(
            "-o - and --json were both given", "stdout takes the picture or the events", "leave one out"
        )
    seeds = range(config.seed, config.seed + config.n)
    targets = [] if to_stdout else picture_files.targets(config.output, config.prompt, seeds, config.force)
    pictures: list[dict[str, Any]] = []
    with Runtime.open(
        config.bundle, config.backend, config.threads, low_memory=config.low_memory, device=config.device
    ) as runtime:
        request = _request(runtime, config, output)
        # To save memory the denoiser is closed before anything is decoded: then all pictures are one part.
        parts = [request] if config.low_memory else list(request.parts())
        batches, per_batch = len(list(request.parts())), len(request.table.timesteps)
        with output.progress("drawing", batches * per_batch) as advance_to:
            for number, part in enumerate(parts):
                sampling = runtime.sample(part)
                while True:
                    try:
                        step = next(sampling)
                    except StopIteration as end:
                        [result] = end.value
                        break
                    advance_to(number * per_batch + step.index + 1)
                if not pictures:
                    output.note(_seeds(seeds), seed=config.seed)
                if to_stdout:
                    output.bytes().write(recipe.encode_png(result.images[0], result.recipe))
                    return
                for k, image in enumerate(result.images):
                    target = targets[len(pictures)]
                    path = picture_files.save(target, image, result.recipe_of(k), config.force)
                    pictures.append({"path": str(path), "seed": result.seeds[k]})
                    output.event("picture", **pictures[-1])
    first = {**result.recipe, "seed": config.seed}  # the result has the seed of its batch
    output.result("\n".join(picture["path"] for picture in pictures), pictures=pictures, recipe=first)


def _seeds(seeds: range) -> str:
    return f"seed: {seeds[0]}" if len(seeds) == 1 else f"seeds: {seeds[0]} to {seeds[-1]}"


def _request(runtime: Runtime, config: GenerateConfig, output: Output) -> Request:
    """Resolve the request; with --images a bad prompt or option is refused before photos are read."""
    options = config.sampling()
    if config.images:
        resolve(runtime.bundle, runtime.backend, [config.prompt], [blank_subject(runtime.bundle)], options)
    subject = _subject(runtime, config, output)
    if config.recipe is not None:
        cli_recipe.check_subject(config.recipe, runtime, subject)
    return runtime.resolve(config.prompt, subject, options)


def personalize(config: PersonalizeConfig, output: Output) -> None:
    """Turn photos into a subject file."""
    path = Path(config.output)
    if config.format == "peft" and not path.suffix:
        files.check_folder(path, PEFT_CONFIG, config.force)
    else:
        files.check_file(path, config.force)
    with Runtime.open(config.bundle, config.backend, config.threads, device=config.device) as runtime:
        photos = _photos(config.images)
        subject = runtime.personalize(photos, config.class_noun, config.strict_images, config.combine)
        if config.combine == "concat" and subject.layout:
            rank = subject.layout.rank
            output.note(f"rank {rank}: for other programs, not to draw with here", rank=rank)
        subject.save(path, config.format, config.force)
    weights = sum(vector.size for vector in subject.lora.values())
    output.note(f"subject: {_count(subject)}, {weights:,} weights", photos=subject.photos)
    output.result(
        str(path), path=str(path), format=config.format, photos=subject.photos, class_noun=subject.class_noun
    )


def _subject(runtime: Runtime, config: GenerateConfig, output: Output) -> Subject | None:
    if config.subject:
        subject = runtime.load_subject(config.subject, config.partial)
        return dataclasses.replace(subject, class_noun=config.class_noun) if config.class_noun else subject
    if not config.images:
        return None
    noun = config.class_noun or noun_in(config.prompt, runtime.bundle)
    subject = runtime.personalize(_photos(config.images), noun, config.strict_images, config.combine)
    output.note(f"subject: {_count(subject)} of a {subject.class_noun}", photos=subject.photos)
    return subject


def _count(subject: Subject) -> str:
    return "1 photo" if subject.photos == 1 else f"{subject.photos} photos"


def _photos(images: tuple[str, ...]) -> Any:
    # A single folder is passed by itself, for the limits and warnings of a folder.
    return images[0] if len(images) == 1 else images
