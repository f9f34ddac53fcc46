"""Make the CLIPTokenizer: byte-level merges learned from the captions, so that any prompt has tokens.

Every word of a caption becomes one token; other words fall into pieces, down to bytes. A few identifiers that no
caption contains are one token each, as `sks` is for CLIP: the base model never saw them, DreamBooth can fill them. So
are the names of the drawings that only the autoencoder sees: a training with more nouns can then start from this one.
"""

import json
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from base import compose, recipe, sprites
from base.recipe import TextEncoder

FOLDER = recipe.SCRATCH / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
CAPTIONS = 20_000


def learn_merges(words: Counter[str], vocab_size: int) -> list[tuple[str, str]]:
    """Learn the merges of byte-pair encoding from counted words."""
    plain = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    learner.normalizer = plain.backend_tokenizer.normalizer
    learner.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        end_of_word_suffix=SUFFIX,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator((word for word, count in words.items() for _ in range(count)), trainer)
    return [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]


def build(captions: list[str], rare: list[str], section: TextEncoder) -> CLIPTokenizer:
    """Make the tokenizer of the captions: both kinds of the 256 bytes, then the merges, then the two marks.

    `rare`: words of no caption that are one token all the same.
    """
    words = Counter(word for caption in captions for word in caption.split())
    words.update(dict.fromkeys(rare, 10))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + SUFFIX for letter in alphabet)]
    room = section.vocab_size - len(tokens) - 2
    merges = learn_merges(words, section.vocab_size)
    known = set(tokens)
    kept: list[tuple[str, str]] = []
    for left, right in merges:
        if left + right not in known and len(kept) < room:
            known.add(left + right)
            tokens.append(left + right)
            kept.append((left, right))
    vocab = {token: number for number, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=kept, model_max_length=section.max_length)


def main() -> None:
    """Learn the tokenizer of the recipe's captions."""
    values, drawn = recipe.load(), sprites.load(sprites.FOLDER)
    captions = [compose.plan(values, drawn, values.pictures.seed, i).caption for i in range(CAPTIONS)]
    rare = [*recipe.IDENTIFIERS, *(word for icon in values.extra_icons for word in icon.split("-"))]
    tokenizer = build(captions, rare, values.text_encoder)
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
