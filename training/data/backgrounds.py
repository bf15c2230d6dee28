"""Draws the scenes that a prompt can name, with random details.

The keys of `SCENES` are the words of the prompt, preposition included: "a robot" + "on a beach".
Pictures are RGB, drawn at twice the size and reduced.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Rng = np.random.Generator


def draw(name: str, size: int, rng: Rng) -> Image.Image:
    """Draws the scene `name`, a key of SCENES: RGB (size, size)."""
    return SCENES[name](2 * size, rng).resize((size, size), Image.Resampling.BOX)


def _near(colour: Colour, rng: Rng, by: int = 8) -> Colour:
    shift = rng.integers(-by, by + 1)
    return tuple(int(np.clip(channel + shift, 0, 255)) for channel in colour)  # type: ignore[return-value]


def _gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    share = np.linspace(0, 1, size)[:, None, None]
    rows = (1 - share) * np.array(top) + share * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))


def _ground(
    size: int, sky: tuple[Colour, Colour], ground: Colour, horizon: float
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = _gradient(size, *sky)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, horizon * size, size, size), fill=ground)
    return image, canvas


def _plain(colour: Colour) -> Callable[[int, Rng], Image.Image]:
    return lambda size, rng: Image.new("RGB", (size, size), colour)


def _beach(size: int, rng: Rng) -> Image.Image:
    horizon = rng.uniform(0.42, 0.5)
    image, canvas = _ground(
        size, ((120, 195, 245), (190, 230, 250)), _near((236, 211, 150), rng), horizon + 0.2
    )
    canvas.rectangle((0, horizon * size, size, (horizon + 0.2) * size), fill=_near((35, 130, 190), rng))
    x = rng.uniform(0.1, 0.9) * size
    canvas.ellipse((x - 0.09 * size, 0.06 * size, x + 0.09 * size, 0.24 * size), fill=(255, 225, 90))
    return image


def _snow(size: int, rng: Rng) -> Image.Image:
    image, canvas = _ground(size, ((165, 185, 210), (205, 215, 230)), (244, 247, 252), rng.uniform(0.5, 0.6))
    for x, y in rng.random((30, 2)) * size:
        canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 255, 255))
    return image


def _forest(size: int, rng: Rng) -> Image.Image:
    image, canvas = _ground(size, ((150, 200, 150), (90, 150, 90)), _near((60, 90, 40), rng), 0.75)
    for k in range(6):
        x = (k + rng.uniform(0.2, 0.8)) / 6 * size
        top, half = rng.uniform(0.02, 0.2) * size, 0.12 * size
        canvas.rectangle((x - 4, 0.6 * size, x + 4, 0.8 * size), fill=(95, 65, 40))
        canvas.polygon(
            [(x, top), (x - half, 0.7 * size), (x + half, 0.7 * size)], fill=_near((25, 95, 45), rng, 15)
        )
    return image


def _night(size: int, rng: Rng) -> Image.Image:
    image = _gradient(size, (8, 10, 40), (35, 35, 90))
    canvas = ImageDraw.Draw(image)
    for x, y in rng.random((40, 2)) * size:
        canvas.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(255, 255, 230))
    x = rng.uniform(0.1, 0.9) * size
    canvas.ellipse((x - 0.08 * size, 0.05 * size, x + 0.08 * size, 0.21 * size), fill=(240, 240, 215))
    return image


def _city(size: int, rng: Rng) -> Image.Image:
    image, canvas = _ground(size, ((200, 205, 215), (225, 225, 228)), (95, 95, 100), 0.84)
    for k in range(6):
        left, top = k / 6 * size, rng.uniform(0.1, 0.45) * size
        canvas.rectangle((left, top, left + size / 6 - 2, 0.84 * size), fill=_near((120, 125, 140), rng, 25))
        for row in np.arange(top + 6, 0.8 * size, 12):
            for column in (0.25, 0.65):
                x = left + column * size / 6
                canvas.rectangle((x, row, x + 4, row + 5), fill=(250, 235, 160))
    return image


def _desert(size: int, rng: Rng) -> Image.Image:
    image, canvas = _ground(size, ((250, 190, 120), (255, 225, 170)), _near((215, 150, 80), rng), 0.62)
    for _ in range(2):
        x, half = rng.uniform(0, 1) * size, rng.uniform(0.25, 0.4) * size
        canvas.ellipse((x - half, 0.52 * size, x + half, 0.85 * size), fill=_near((225, 160, 90), rng, 10))
    x = rng.choice([0.1, 0.9]) * size
    canvas.rectangle((x - 6, 0.35 * size, x + 6, 0.75 * size), fill=(60, 125, 70))
    canvas.rectangle((x - 16, 0.45 * size, x + 16, 0.52 * size), fill=(60, 125, 70))
    return image


def _underwater(size: int, rng: Rng) -> Image.Image:
    image = _gradient(size, (60, 190, 215), (5, 70, 130))
    canvas = ImageDraw.Draw(image)
    for x in rng.uniform(0, size, 4):
        canvas.line([(x, size), (x + 8, 0.85 * size), (x - 4, 0.7 * size)], fill=(20, 140, 100), width=6)
    for x, y in rng.random((12, 2)) * size:
        canvas.ellipse((x - 4, y - 4, x + 4, y + 4), outline=(200, 240, 250), width=2)
    return image


SCENES: dict[str, Callable[[int, Rng], Image.Image]] = {
    "on a beach": _beach,
    "in the snow": _snow,
    "in a forest": _forest,
    "under a night sky": _night,
    "in a city": _city,
    "in a desert": _desert,
    "underwater": _underwater,
    "on a plain white background": _plain((255, 255, 255)),
    "on a plain red background": _plain((205, 45, 45)),
    "on a plain blue background": _plain((45, 75, 200)),
    "on a plain green background": _plain((55, 160, 75)),
    "on a plain yellow background": _plain((245, 205, 60)),
}
