"""What is trained: how full, lora, textual_inversion and pivotal, which `params.Train` tells apart, change a model.

The loop sees named weights that are trainable, in float32, and groups of them with their rates; nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dreambooth import adapters
from dreambooth.adapters import EMBEDDINGS_FILE, LORA_FILE, TokenEmbedding
from dreambooth.checkpoint import named_weights
from dreambooth.models import DTYPES, Model, cast_module, save_parts
from dreambooth.params import Train

HALF = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def reads_trained_text(settings: Train) -> bool:
    """Whether the UNet reads text of which anything is trained."""
    return settings.trains_encoders or settings.learns_token


def add_token(model: Model, settings: Train, identifier: str, class_noun: str) -> None:
    """Extend the vocabulary by the identifier, which begins as the class noun, if the method learns it.

    Raises:
        TrainingError: the vocabulary has it already.
    """
    if not settings.learns_token:
        return
    for tokenizer, encoder in zip(model.tokenizers, model.encoders.values(), strict=True):
        first = adapters.mean_embedding(tokenizer, encoder, class_noun)
        adapters.set_embedding(encoder, adapters.add_token(tokenizer, encoder, identifier), first)
    model.learned_token = identifier


def frozen_dtype(settings: Train) -> torch.dtype | None:
    """Return the precision of a UNet that is frozen, None where it is float32 or the UNet is trained.

    The magnitudes of DoRA are lengths of its rows: those of rounded rows would move the weights of the base when they
    are merged, before anything is learned.
    """
    if settings.method == "full" or (settings.adds_lora and settings.use_dora):
        return None
    return HALF[settings.mixed_precision]


def make_trainable(model: Model, settings: Train) -> dict[str, torch.nn.Module]:
    """Freeze the model but for what the method trains; return the modules that hold it, in training mode.

    With a half precision a UNet that is frozen is kept in it, but for DoRA: only what is trained needs float32.
    """
    trained: dict[str, torch.nn.Module] = {}
    if settings.method != "textual_inversion":
        trained["unet"] = model.unet
    if reads_trained_text(settings):
        trained |= model.encoders
    if (half := frozen_dtype(settings)) is not None:
        cast_module(model.unet, half)
    if settings.method == "full":
        for module in trained.values():
            module.requires_grad_(True)
    if settings.adds_lora:
        for part, module in trained.items():
            if part == "unet" or settings.trains_encoders:
                adapters.add_lora(part, module, settings.rank, settings.lora_alpha, settings.use_dora, settings.seed)
    if settings.learns_token:
        for tokenizer, encoder in zip(model.tokenizers, model.encoders.values(), strict=True):
            number = tokenizer.convert_tokens_to_ids(model.learned_token)
            encoder.set_input_embeddings(TokenEmbedding(encoder.get_input_embeddings(), number))
    for module in trained.values():
        module.train()
    return trained


def parameter_groups(trained: Mapping[str, torch.nn.Module], settings: Train) -> list[dict[str, Any]]:
    """Return the trainable weights by rate: `factor` is what the rate of the schedule is multiplied with."""
    text = settings.text_encoder_learning_rate or settings.learning_rate
    token = settings.embedding_learning_rate or settings.learning_rate
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, weight in named_weights(trained):
        rate = settings.learning_rate if name.startswith("unet.") else token if name.endswith(".learned") else text
        groups.setdefault(rate / settings.learning_rate, []).append(weight)
    return [{"params": weights, "factor": factor} for factor, weights in groups.items()]


def count_weights(model: Model, settings: Train) -> int:
    """Return how many weights would be trained, before any is prepared."""
    parts: dict[str, torch.nn.Module] = {"unet": model.unet}
    parts |= model.encoders if settings.trains_encoders else {}
    if settings.method == "full":
        return sum(weight.numel() for module in parts.values() for weight in module.parameters())
    token = sum(encoder.config.hidden_size for encoder in model.encoders.values()) if settings.learns_token else 0
    if not settings.adds_lora:
        return token
    layers = [layer for part, module in parts.items() for layer in adapters.adapted_layers(part, module)]
    magnitudes = sum(layer.out_features for layer in layers) if settings.use_dora else 0
    return token + magnitudes + settings.rank * sum(layer.in_features + layer.out_features for layer in layers)


def settle(model: Model) -> None:
    """Put a learned embedding into the table, so that the encoders are plain ones again."""
    for encoder in model.encoders.values():
        embedding = encoder.get_input_embeddings()
        if isinstance(embedding, TokenEmbedding):
            encoder.set_input_embeddings(embedding.table)
            adapters.set_embedding(encoder, embedding.number, embedding.learned)


def save_trained(model: Model, folder: Path, settings: Train) -> None:
    """Write what was trained: whole parts, or LoRA and embedding as the files that diffusers loads onto the base."""
    dtype = DTYPES[settings.save_dtype]
    if settings.method == "full":
        save_parts(model, folder, dtype, ("unet", *(model.encoders if settings.train_text_encoder else ())))
    if settings.adds_lora:
        adapters.save_lora(folder / LORA_FILE, {"unet": model.unet, **model.encoders}, dtype)
    if settings.learns_token:
        assert model.learned_token is not None
        vectors = {
            name: encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(model.learned_token)]
            for tokenizer, (name, encoder) in zip(model.tokenizers, model.encoders.items(), strict=True)
        }
        adapters.save_embeddings(folder / EMBEDDINGS_FILE, model.learned_token, vectors, dtype)
