"""Teach the text encoder to say what a caption says, before any picture is drawn.

Trained together with the UNet from nothing, a text encoder of this size carried the backgrounds within minutes and the
nouns hardly at all after 100,000 pictures: a noun is one token of many, and changes little of a picture that cannot
yet be drawn well. So each token behind the caption first learns to name the noun, the context and all words; that takes
a minute. The denoiser then finds the noun wherever its attention looks.

B rows, L tokens, D width of the text encoder.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from base import compose, recipe, sprites, tokenizer
from base.recipe import Recipe
from base.sprites import Sprites

FOLDER = recipe.SCRATCH / "text_encoder"


def build(values: Recipe, words: CLIPTokenizer) -> CLIPTextModel:
    """Make the text encoder for the tokenizer's ids."""
    section = values.text_encoder
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=section.hidden_size,
        intermediate_size=4 * section.hidden_size,
        projection_dim=section.hidden_size,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        max_position_embeddings=section.max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(words: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Give the ids of captions, padded to the full length: (B, L)."""
    length: int = words.model_max_length
    encoded = words(captions, padding="max_length", truncation=True, max_length=length)
    input_ids: torch.Tensor = torch.tensor(encoded["input_ids"], dtype=torch.long)
    return input_ids


def train(values: Recipe, drawn: Sprites, words: CLIPTokenizer) -> tuple[CLIPTextModel, float]:
    """Train on the captions of the pictures; give the text encoder and how often the last token names the noun."""
    section = values.text_encoder
    torch.manual_seed(section.seed)
    model = build(values, words)
    plans = [compose.plan(values, drawn, values.pictures.seed, i) for i in range(section.captions)]
    input_ids = tokenize(words, [plan.caption for plan in plans])
    nouns, contexts = list(values.nouns), ["", *values.colours, *values.scenes]
    noun = torch.tensor([nouns.index(plan.noun) for plan in plans])
    context = torch.tensor([contexts.index(plan.context) for plan in plans])
    said = torch.zeros(len(plans), len(words)).scatter_(1, input_ids, 1.0)
    heads = nn.Linear(section.hidden_size, len(nouns) + len(contexts) + len(words))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=section.learning_rate, weight_decay=1e-2)
    rng = np.random.default_rng(section.seed)
    right = 0.0
    bar = tqdm(range(section.steps), desc="text encoder", mininterval=10)
    for _ in bar:
        rows = torch.from_numpy(rng.integers(0, len(plans), section.batch_size))
        ids = input_ids[rows]
        behind = ids == words.eos_token_id
        owner = behind.nonzero()[:, 0]
        answers = heads(model(ids).last_hidden_state[behind]).split([len(nouns), len(contexts), len(words)], dim=-1)
        loss = F.cross_entropy(answers[0], noun[rows][owner]) + F.cross_entropy(answers[1], context[rows][owner])
        loss = loss + 10 * F.binary_cross_entropy_with_logits(answers[2], said[rows][owner])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        right = 0.9 * right + 0.1 * (answers[0].argmax(-1) == noun[rows][owner]).float().mean().item()
        bar.set_postfix(loss=f"{loss.item():.4f}", noun=f"{right:.3f}", refresh=False)
    return model.eval(), right


def main() -> None:
    """Train the text encoder of the recipe."""
    values, drawn = recipe.load(), sprites.load(sprites.FOLDER)
    model, _ = train(values, drawn, CLIPTokenizer.from_pretrained(tokenizer.FOLDER))
    model.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
