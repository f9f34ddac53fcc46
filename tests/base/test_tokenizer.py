"""The tokenizer of the captions."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from base import tokenizer
from base.recipe import Recipe

CAPTIONS = ["a photo of a teddy bear in space", "a fox on a blue background", "a dog"]


@pytest.fixture(scope="module")
def words(values: Recipe) -> CLIPTokenizer:
    """Give a tokenizer of few captions."""
    return tokenizer.build(CAPTIONS, ["sks", "giraffe"], values.text_encoder)


@pytest.mark.parametrize("prompt", ["a photo of a sks dog", "zürich", "東京", "a 🐕!?", "x" * 9, ""])
def test_any_prompt_comes_back(words: CLIPTokenizer, prompt: str) -> None:
    ids = words(prompt).input_ids
    assert words.unk_token_id not in ids[1:-1]
    assert words.decode(ids, skip_special_tokens=True).replace(" ", "") == prompt.replace(" ", "")


@pytest.mark.parametrize("word", ["photo", "teddy", "background", "sks", "giraffe"])
def test_words_of_captions_and_rare_words_are_one_token(words: CLIPTokenizer, word: str) -> None:
    assert len(words(word).input_ids) == 3


def test_prompt_is_padded_and_cut_to_the_model_length(words: CLIPTokenizer, values: Recipe) -> None:
    length = values.text_encoder.max_length
    for prompt in ("a dog", "a very " * 50):
        assert len(words(prompt, padding="max_length", truncation=True).input_ids) == length


def test_saved_tokenizer_gives_the_same_ids(words: CLIPTokenizer, tmp_path: Path) -> None:
    words.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == words.model_max_length
    assert again(CAPTIONS).input_ids == words(CAPTIONS).input_ids


def test_vocabulary_stays_in_its_size(values: Recipe) -> None:
    section = values.text_encoder.model_copy(update={"vocab_size": 520})
    assert len(tokenizer.build(CAPTIONS, [], section)) == 520
