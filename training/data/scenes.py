"""The small world: a drawn subject in a named scene.

A caption names the coarse noun and the scene. The subject's palette, pattern and proportions are free
parameters (`DrawnSubject`), which the base model cannot know and the hypernetwork has to add. A description
also names colours and pattern; from descriptions the base model learns to draw them from its text, which is
where a LoRA can add more.

Units: drawings use a unit square (x to the right, y down), are drawn at `OVERSAMPLE` times the size and
reduced once, so every edge is anti-aliased. Pictures are (size, size, 3) uint8.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from hyperrt.training.data import backgrounds

OVERSAMPLE = 4
TOKEN = "sks"  # stands for [V] in training captions
PATTERNS = ("plain", "stripes", "dots", "checks")
SPLIT_SEEDS = {"train": 0, "test": 1, "example": 2, "judge": 3}  # part of a subject's seed: no split overlaps

Colour = tuple[int, int, int]
HUES = (
    "red", "orange", "yellow", "lime", "green", "teal", "cyan", "azure", "blue", "purple", "magenta", "pink",
)  # fmt: skip
SHADES = ("dark", "pale", "black", "grey", "white")
WHITE, INK = (255, 255, 255), (35, 35, 45)


@dataclass(frozen=True)
class DrawnSubject:
    """The parameters of a subject; a caption names only the noun, a description also colours and pattern."""

    noun: str
    palette: tuple[Colour, Colour, Colour]  # body, pattern and parts, accent
    pattern: str
    repeats: int  # pattern periods over the unit square
    angle: float  # of the pattern, degrees
    parts: tuple[float, ...]  # eight numbers in [0, 1]: proportions and counts


def drawn_subject(noun: str, split: str, index: int) -> DrawnSubject:
    """Subject number `index` of a split; the same arguments always give the same subject."""
    rng = np.random.default_rng([SPLIT_SEEDS[split], NOUNS.index(noun), index])
    return DrawnSubject(
        noun=noun,
        palette=_palette(rng),
        pattern=PATTERNS[rng.integers(len(PATTERNS))],
        repeats=int(rng.integers(4, 7)),
        angle=float(rng.choice([0, 45, 90, 135])),
        parts=tuple(float(value) for value in rng.random(8)),
    )


def _palette(rng: np.random.Generator) -> tuple[Colour, Colour, Colour]:
    """Three colours of clearly different hues that are visible on white."""
    hue = rng.random()
    hues = (hue, hue + rng.uniform(0.2, 0.8), hue + rng.uniform(0.2, 0.8))
    return tuple(_colour(h, rng.uniform(0.55, 0.95), rng.uniform(0.5, 0.95)) for h in hues)  # type: ignore[return-value]


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def colour_name(colour: Colour) -> str:
    """The name of a colour: `red`, `dark teal`, `pale pink`, or a grey."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
    if value < 0.25:
        return "black"
    if saturation < 0.2:
        return "white" if value > 0.85 else "grey"
    name = HUES[round(12 * hue) % 12]
    if value < 0.65:
        return f"dark {name}"
    return f"pale {name}" if saturation < 0.7 else name


def describe(subject: DrawnSubject) -> str:
    """Words for a caption in place of the noun: `red fish with dark green dots and pink details`."""
    body, second, accent = map(colour_name, subject.palette)
    pattern = "parts" if subject.pattern == "plain" else subject.pattern
    return f"{body} {subject.noun} with {second} {pattern} and {accent} details"


class Painter:
    """Draws shapes in unit coordinates on a transparent canvas."""

    def __init__(self, size: int, subject: DrawnSubject) -> None:
        self.size = size
        self.subject = subject
        self.image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)

    def points(self, values: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * self.size, y * self.size) for x, y in values]

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        s = self.size
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=colour)

    def polygon(self, values: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon(self.points(values), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, radius: float = 0.0) -> None:
        s = self.size
        self.draw.rounded_rectangle((x0 * s, y0 * s, x1 * s, y1 * s), radius * s, fill=colour)

    def line(self, values: list[tuple[float, float]], colour: Colour, width: float) -> None:
        self.draw.line(
            self.points(values), fill=colour, width=max(1, round(width * self.size)), joint="curve"
        )

    def ring(self, x: float, y: float, radius: float, colour: Colour, width: float) -> None:
        s = self.size
        box = ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s)
        self.draw.ellipse(box, outline=colour, width=max(1, round(width * s)))

    def eye(self, x: float, y: float, radius: float) -> None:
        self.ellipse(x, y, radius, radius, WHITE)
        self.ellipse(x, y, radius * 0.5, radius * 0.5, INK)

    def body(self, shape: Callable[[Painter], None]) -> None:
        """Fills the outline that `shape` draws with the body colour and the subject's pattern."""
        stencil = Painter(self.size, self.subject)
        shape(stencil)
        mask = stencil.image.getchannel("A")
        self.image.paste(self.subject.palette[0], mask=mask)
        if self.subject.pattern != "plain":
            pattern = _pattern(self.subject, self.size)
            self.image.paste(self.subject.palette[1], mask=ImageChops.multiply(mask, pattern))


def _pattern(subject: DrawnSubject, size: int) -> Image.Image:
    """Mask (size, size) in mode L: 255 for the second colour."""
    y, x = np.mgrid[0:size, 0:size] / size
    turn = math.radians(subject.angle)
    u = (x * math.cos(turn) + y * math.sin(turn)) * subject.repeats
    v = (y * math.cos(turn) - x * math.sin(turn)) * subject.repeats
    if subject.pattern == "stripes":
        inside = (u % 1.0) < 0.42
    elif subject.pattern == "dots":
        inside = ((u % 1.0) - 0.5) ** 2 + ((v % 1.0) - 0.5) ** 2 < 0.09
    else:
        inside = ((u % 1.0) < 0.5) == ((v % 1.0) < 0.5)
    return Image.fromarray((inside * 255).astype(np.uint8))


def _robot(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    head, wide = 0.13 + 0.06 * q[0], 0.2 + 0.08 * q[1]
    p.line([(0.5, 0.2), (0.5, 0.06)], second, 0.035)
    p.ellipse(0.5, 0.07, 0.05, 0.05, accent)
    for side in (-1, 1):
        p.line([(0.5 + side * wide, 0.5), (0.5 + side * (wide + 0.13), 0.55 + 0.2 * q[2])], second, 0.08)
        p.box(0.5 + side * 0.12 - 0.06, 0.74, 0.5 + side * 0.12 + 0.06, 0.95, second, 0.03)
    p.body(lambda s: s.box(0.5 - wide, 0.42, 0.5 + wide, 0.8, INK, 0.03 + 0.1 * q[3]))
    p.box(0.5 - head - 0.06, 0.15, 0.5 + head + 0.06, 0.41, accent, 0.03 + 0.09 * q[4])
    for side in (-1, 1):
        p.eye(0.5 + side * 0.09, 0.27, 0.055)
    p.line([(0.42, 0.36), (0.58, 0.36)], INK, 0.025)


def _fish(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    rx, ry = 0.3 + 0.06 * q[0], 0.17 + 0.11 * q[1]
    tail = 0.14 + 0.1 * q[2]
    p.polygon([(0.62, 0.5), (0.95, 0.5 - tail), (0.87, 0.5), (0.95, 0.5 + tail)], second)
    p.polygon([(0.3, 0.5 - ry * 0.7), (0.5 + 0.1 * q[3], 0.5 - ry - 0.14), (0.6, 0.5 - ry * 0.6)], accent)
    p.polygon([(0.36, 0.5 + ry * 0.7), (0.5, 0.5 + ry + 0.12), (0.56, 0.5 + ry * 0.6)], accent)
    p.body(lambda s: s.ellipse(0.42, 0.5, rx, ry, INK))
    p.eye(0.22, 0.45, 0.055)


def _bird(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    rx, ry = 0.22 + 0.06 * q[0], 0.24 + 0.06 * q[1]
    for side in (-1, 1):
        p.line([(0.5 + side * 0.08, 0.75), (0.5 + side * 0.08, 0.95)], accent, 0.035)
    p.polygon([(0.7, 0.55), (0.97, 0.42 + 0.2 * q[2]), (0.93, 0.62 + 0.2 * q[2])], second)
    p.body(lambda s: s.ellipse(0.52, 0.58, rx, ry, INK))
    p.ellipse(0.4, 0.3, 0.15 + 0.03 * q[3], 0.15 + 0.03 * q[3], second)
    p.polygon([(0.28, 0.26), (0.06 + 0.1 * q[4], 0.33), (0.28, 0.38)], accent)
    for crest in range(1 + int(3 * q[5])):
        p.line([(0.4 + 0.04 * crest, 0.18), (0.4 + 0.07 * crest, 0.05)], accent, 0.035)
    p.eye(0.37, 0.28, 0.05)


def _house(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    wide, eaves = 0.25 + 0.1 * q[0], 0.4 + 0.06 * q[1]
    chimney = 0.5 + wide * (0.35 if q[2] < 0.5 else -0.65)
    p.box(chimney, 0.1, chimney + 0.1, eaves, accent)
    p.body(lambda s: s.box(0.5 - wide, eaves - 0.02, 0.5 + wide, 0.94, INK))
    p.polygon([(0.5 - wide - 0.08, eaves), (0.5, 0.08 + 0.1 * q[3]), (0.5 + wide + 0.08, eaves)], second)
    door = 0.5 + (q[4] - 0.5) * 0.2
    p.box(door - 0.07, 0.68, door + 0.07, 0.94, accent, 0.06 * q[5])
    for side in (-1, 1):
        p.box(0.5 + side * 0.17 - 0.06, 0.5, 0.5 + side * 0.17 + 0.06, 0.62, WHITE)


def _car(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    roof, front = 0.26 + 0.1 * q[0], 0.3 - 0.1 * q[1]
    cabin = [(front, 0.52), (front + 0.1, roof), (0.7, roof), (0.8 + 0.08 * q[2], 0.52)]
    p.polygon(cabin, second)
    p.polygon([(front + 0.06, 0.5), (front + 0.13, roof + 0.05), (0.48, roof + 0.05), (0.48, 0.5)], WHITE)
    p.polygon([(0.53, 0.5), (0.53, roof + 0.05), (0.67, roof + 0.05), (0.75, 0.5)], WHITE)
    p.body(lambda s: s.box(0.05, 0.48, 0.95, 0.74, INK, 0.05 + 0.07 * q[3]))
    wheel = 0.1 + 0.04 * q[4]
    for x in (0.26, 0.74):
        p.ellipse(x, 0.76, wheel, wheel, INK)
        p.ellipse(x, 0.76, wheel * 0.55, wheel * 0.55, accent)
    p.ellipse(0.08, 0.58, 0.035, 0.045, accent)


def _flower(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    petals, long = 5 + int(4 * q[0]), 0.15 + 0.05 * q[1]
    p.line([(0.5, 0.4), (0.5 + 0.05 * (q[2] - 0.5), 0.97)], accent, 0.05)
    for side in (-1, 1):
        p.polygon([(0.5, 0.85), (0.5 + side * 0.26, 0.64 + 0.1 * q[3]), (0.5 + side * 0.12, 0.88)], accent)

    def corolla(s: Painter) -> None:
        for k in range(petals):
            turn = 2 * math.pi * k / petals
            s.ellipse(0.5 + 0.2 * math.cos(turn), 0.34 + 0.2 * math.sin(turn), long * 0.85, long * 0.85, INK)

    p.body(corolla)
    p.ellipse(0.5, 0.34, 0.1 + 0.04 * q[4], 0.1 + 0.04 * q[4], second)


def _monster(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    wide, top = 0.26 + 0.08 * q[0], 0.2 + 0.06 * q[1]
    for side in (-1, 1):
        p.polygon(
            [
                (0.5 + side * 0.2, top + 0.1),
                (0.5 + side * (0.2 + 0.15 * q[2]), 0.03),
                (0.5 + side * 0.07, top + 0.03),
            ],
            accent,
        )
        p.line([(0.5 + side * wide, 0.55), (0.5 + side * (wide + 0.12), 0.4 + 0.3 * q[3])], second, 0.08)
        p.ellipse(0.5 + side * 0.13, 0.92, 0.1, 0.05, second)
    p.body(lambda s: s.box(0.5 - wide, top, 0.5 + wide, 0.92, INK, 0.12 + 0.12 * q[4]))
    eyes = 1 + int(3 * q[5])
    for k in range(eyes):
        p.eye(0.5 + (k - (eyes - 1) / 2) * 0.15, 0.38, 0.07 if eyes > 1 else 0.1)
    p.box(0.38, 0.56, 0.62, 0.62 + 0.06 * q[6], INK, 0.03)
    for k in range(3):
        p.polygon([(0.41 + 0.06 * k, 0.56), (0.47 + 0.06 * k, 0.56), (0.44 + 0.06 * k, 0.61)], WHITE)


def _mug(p: Painter, q: tuple[float, ...]) -> None:
    _, second, accent = p.subject.palette
    wide, top = 0.22 + 0.08 * q[0], 0.2 + 0.12 * q[1]
    p.ring(0.42 + wide, 0.55, 0.14 + 0.05 * q[2], second, 0.06)
    p.body(lambda s: s.box(0.42 - wide, top, 0.42 + wide, 0.92, INK, 0.03 + 0.1 * q[3]))
    p.ellipse(0.42, top, wide, 0.06, second)
    p.ellipse(0.42, top, wide * 0.8, 0.04, accent)
    p.box(0.42 - wide, 0.8, 0.42 + wide, 0.86, accent)


DRAWINGS: dict[str, Callable[[Painter, tuple[float, ...]], None]] = {
    "robot": _robot,
    "fish": _fish,
    "bird": _bird,
    "house": _house,
    "car": _car,
    "flower": _flower,
    "monster": _monster,
    "mug": _mug,
}
NOUNS = tuple(DRAWINGS)
BACKGROUNDS = tuple(backgrounds.SCENES)


def draw_subject(subject: DrawnSubject, size: int) -> Image.Image:
    """Draws a subject: RGBA (size, size) on transparent ground."""
    painter = Painter(size * OVERSAMPLE, subject)
    DRAWINGS[subject.noun](painter, subject.parts)
    return painter.image.resize((size, size), Image.Resampling.BOX)


def compose(drawing: Image.Image, background: str, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Places a drawing (RGBA) in a scene: (size, size, 3) uint8; place, size and tilt vary a little."""
    scene = backgrounds.draw(background, size, rng)
    side = round(size * rng.uniform(0.7, 0.82))
    placed = drawing.resize((side, side), Image.Resampling.LANCZOS)
    placed = placed.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC)
    x = round((size - side) / 2 + rng.uniform(-0.05, 0.05) * size)
    y = round((size - side) * 0.6 + rng.uniform(-0.04, 0.04) * size)
    scene.paste(placed, (x, y), placed)
    return np.asarray(scene)


def scene(subject: DrawnSubject, background: str, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draws one photo of a subject: (size, size, 3) uint8."""
    return compose(draw_subject(subject, size), background, rng, size)


def caption(noun: str, background: str, token: str | None = None) -> str:
    """The caption of a scene: `a robot on a beach`, or `a sks robot on a beach` with a token.

    Args:
        noun: or a description.
    """
    words = f"{token} {noun}" if token else noun
    return f"{'an' if words[0] in 'aeio' else 'a'} {words} {background}"
