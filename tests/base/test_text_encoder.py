"""The text encoder learns to say what a caption says."""

import torch

from base import compose, text_encoder, tokenizer
from base.recipe import Recipe
from base.sprites import Sprites


def test_last_tokens_learn_to_name_the_noun(values: Recipe, drawn: Sprites) -> None:
    captions = [compose.plan(values, drawn, 0, i).caption for i in range(100)]
    words = tokenizer.build(captions, [], values.text_encoder)
    model, right = text_encoder.train(values, drawn, words)
    assert right > 0.8
    ids = text_encoder.tokenize(words, ["a photo of a dog in space", "a photo of a fox in space"])
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
    assert hidden.shape == (2, values.text_encoder.max_length, values.text_encoder.hidden_size)
    assert (hidden[0, -1] - hidden[1, -1]).norm() > 0.5
