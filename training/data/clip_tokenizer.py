"""A CLIP tokenizer for the small world: CLIP's rules, with the words of the captions as its vocabulary.

Every byte is in the vocabulary, so any prompt can be encoded; other words take several tokens.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from hyperrt.training.data import scenes

START, END = "<|startoftext|>", "<|endoftext|>"


def build(folder: Path, max_tokens: int, nouns: Sequence[str] = scenes.NOUNS) -> CLIPTokenizer:
    """Writes tokenizer.json and the config of transformers into a folder.

    Args:
        nouns: of the captions; each of their words becomes one token.
    """
    vocabulary, merges = _learn(_corpus(nouns))
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=START, eos_token=END, pad_token=END, unk_token=END,
        model_max_length=max_tokens,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def padded(tokenizer: CLIPTokenizer, pad: str) -> CLIPTokenizer:
    """A copy with another padding token, such as "!" for SDXL's second text encoder."""
    copied = copy.deepcopy(tokenizer)
    copied.pad_token = pad
    copied.add_tokens(pad, special_tokens=True)
    return copied


def _corpus(nouns: Sequence[str]) -> list[str]:
    captions = [scenes.caption(noun, place, scenes.TOKEN) for noun in nouns for place in scenes.BACKGROUNDS]
    described = " ".join((*scenes.HUES, *scenes.SHADES, *scenes.PATTERNS, "parts details"))
    return [*captions, described, "a photo of the picture drawing toy cat dog house with and of in at by"]


def _learn(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns byte-level BPE with CLIP's end-of-word mark, so that each word of a caption is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    pieces = [*dict.fromkeys([*pieces, *learned]), START, END]
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return {piece: number for number, piece in enumerate(pieces)}, merges
