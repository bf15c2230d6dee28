"""Prompt packs of evaluations, by name, and the subjects of DreamBench.

A template has the placeholder [V] and the subject's noun: "a [V] {noun} in the jungle".
"""

from __future__ import annotations

from dataclasses import dataclass

from hyperrt.sampling.prompts import split_prompt
from hyperrt.training.data import scenes

DREAMBENCH_SOURCE = "google/dreambooth on GitHub, dataset/prompts_and_classes.txt, 4f887af (CC BY 4.0)"

# Used for objects and for live subjects: places first, properties last.
_PLACES = (
    "a [V] {noun} in the jungle",
    "a [V] {noun} in the snow",
    "a [V] {noun} on the beach",
    "a [V] {noun} on a cobblestone street",
    "a [V] {noun} on top of pink fabric",
    "a [V] {noun} on top of a wooden floor",
    "a [V] {noun} with a city in the background",
    "a [V] {noun} with a mountain in the background",
    "a [V] {noun} with a blue house in the background",
    "a [V] {noun} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red [V] {noun}",
    "a purple [V] {noun}",
    "a shiny [V] {noun}",
    "a wet [V] {noun}",
    "a cube shaped [V] {noun}",
)
_OBJECT_PROMPTS = (
    "a [V] {noun} with a wheat field in the background",
    "a [V] {noun} with a tree and autumn leaves in the background",
    "a [V] {noun} with the Eiffel Tower in the background",
    "a [V] {noun} floating on top of water",
    "a [V] {noun} floating in an ocean of milk",
    "a [V] {noun} on top of green grass with sunflowers around it",
    "a [V] {noun} on top of a mirror",
    "a [V] {noun} on top of the sidewalk in a crowded street",
    "a [V] {noun} on top of a dirt road",
    "a [V] {noun} on top of a white rug",
)
_LIVE_PROMPTS = (
    "a [V] {noun} wearing a red hat",
    "a [V] {noun} wearing a santa hat",
    "a [V] {noun} wearing a rainbow scarf",
    "a [V] {noun} wearing a black top hat and a monocle",
    "a [V] {noun} in a chef outfit",
    "a [V] {noun} in a firefighter outfit",
    "a [V] {noun} in a police outfit",
    "a [V] {noun} wearing pink glasses",
    "a [V] {noun} wearing a yellow shirt",
    "a [V] {noun} in a purple wizard outfit",
)
# Named by HyperDreamBooth and HyperNet Fields, which did not publish the whole list.
_NAMED_FOR_FACES = (
    "a [V] {noun} as a Minecraft character",
    "a [V] {noun} wearing a santa hat",
    "a [V] {noun} as a top gun pilot",
    "an Instagram selfie of a [V] {noun}",
    "a Pixar character of a [V] {noun}",
    "a [V] {noun} with bark skin",
    "a [V] {noun} as a rockstar",
    "a professional photo of a [V] {noun}",
    "a [V] {noun} in impressionist style",
)
_OWN_FOR_FACES = (
    "an oil painting of a [V] {noun}",
    "a pencil sketch of a [V] {noun}",
    "a watercolor painting of a [V] {noun}",
    "a marble statue of a [V] {noun}",
    "a black and white photo of a [V] {noun}",
)
_NO_PLACES_FOR_FACES = (4, 5, 9)  # of _PLACES: fabric, floor, rug


@dataclass(frozen=True)
class Pack:
    """Named prompts.

    Attributes:
        source: where they were published.
        templates: numbered by their order, as in the pictures' file names.
        note: why scores of these prompts cannot be compared with published ones; empty if they can.
    """

    name: str
    source: str
    templates: tuple[str, ...]
    note: str = ""

    def prompts(self, noun: str) -> list[str]:
        """The prompts for a noun, with the placeholder."""
        return [template.format(noun=noun) for template in self.templates]

    def plain(self, noun: str) -> list[str]:
        """The prompts without the placeholder, as CLIP-T reads them: "a dog in the jungle"."""
        return [split_prompt(prompt, noun).generic for prompt in self.prompts(noun)]


PACKS = {
    pack.name: pack
    for pack in (
        Pack("dreambench-objects", DREAMBENCH_SOURCE, _PLACES + _OBJECT_PROMPTS + _PROPERTIES),
        Pack("dreambench-live", DREAMBENCH_SOURCE, _PLACES + _LIVE_PROMPTS + _PROPERTIES),
        Pack(
            "hyperrt-faces-v1",
            "nine prompts that HyperDreamBooth and HyperNet Fields name, 16 of DreamBench, five of ours",
            _NAMED_FOR_FACES
            + tuple(
                template
                for k, template in enumerate(_PLACES + _LIVE_PROMPTS)
                if k not in _NO_PLACES_FOR_FACES and template not in _NAMED_FOR_FACES
            )
            + _OWN_FOR_FACES,
            "the 30 prompts of the papers were not published whole; these are others",
        ),
        Pack(
            "drawn-v1",
            "training/data/scenes.py",
            tuple(scenes.caption("{noun}", place, "[V]") for place in scenes.BACKGROUNDS),
            "drawn subjects; no paper has them",
        ),
    )
}

LIVE = ("cat", "dog")  # nouns of DreamBench's live subjects
DREAMBENCH = {  # subject -> noun
    "backpack": "backpack",
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "can": "can",
    "candle": "candle",
    "cat": "cat",
    "cat2": "cat",
    "clock": "clock",
    "colorful_sneaker": "sneaker",
    "dog": "dog",
    "dog2": "dog",
    "dog3": "dog",
    "dog5": "dog",
    "dog6": "dog",
    "dog7": "dog",
    "dog8": "dog",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "teapot": "teapot",
    "vase": "vase",
    "wolf_plushie": "stuffed animal",
}
