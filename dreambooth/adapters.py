"""Small additions to a frozen model: low-rank updates by peft (LoRA, DoRA), and one new word in a vocabulary.

Files are those that diffusers reads: `pipeline.load_lora_weights(folder)` and `pipeline.load_textual_inversion`.
peft and diffusers are imported where they are used: their import takes seconds, and most stages need neither.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dreambooth import rng
from dreambooth.errors import ModelError, TrainingError

LORA_FILE, EMBEDDINGS_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
# The projections of attention: what diffusers' own LoRA scripts adapt, and what kohya's names can say.
UNET_TARGETS = ("to_k", "to_out.0", "to_q", "to_v")
TEXT_TARGETS = ("k_proj", "out_proj", "q_proj", "v_proj")
METADATA = "lora_adapter_metadata"  # the key of diffusers; alone, because safetensors writes several in any order
CLIP_KEYS = ("clip_l", "clip_g")  # names of the two encoders of SDXL in a file of embeddings, as diffusers' scripts do
_ADAPTER = "default"
_CONFIG = ("r", "lora_alpha", "use_dora")


def targets_of(part: str) -> tuple[str, ...]:
    """Return which linear layers of a part are adapted, by the ends of their names."""
    return UNET_TARGETS if part == "unet" else TEXT_TARGETS


def adapted_layers(part: str, module: torch.nn.Module) -> list[torch.nn.Linear]:
    """Return the layers of a part that LoRA adapts."""
    ends = tuple(f".{target}" for target in targets_of(part))
    return [
        layer for name, layer in module.named_modules() if name.endswith(ends) and isinstance(layer, torch.nn.Linear)
    ]


def add_lora(part: str, module: torch.nn.Module, rank: int, alpha: float, dora: bool, seed: int) -> None:
    """Put a low-rank update beside each adapted layer (Hu et al. 2022), zero at first, in float32.

    Args:
        part: name of the module, from which the first values follow as well.
        module: is frozen; only the updates will be trainable.
        rank: r.
        alpha: the update counts alpha / r.
        dora: with a magnitude of its own for each output (Liu et al. 2024).
        seed: of the first values of A: (seed, name), whatever the device and the number of processes.
    """
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets_of(part)), use_dora=dora, init_lora_weights=True
    )
    inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
        if ".lora_A." in name:
            first = torch.empty(weight.shape)
            torch.nn.init.kaiming_uniform_(first, math.sqrt(5), generator=rng.generator(seed, f"lora/{part}.{name}"))
            weight.data.copy_(first)


@contextmanager
def without_lora(module: torch.nn.Module) -> Iterator[None]:
    """Let a module be its base again for a while."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_lora(path: Path, modules: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> None:
    """Write the updates of several parts into one file, under the names of diffusers, with rank and alpha.

    Args:
        path: of the file.
        modules: by part; parts without updates are passed over.
        dtype: of the saved weights.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    weights: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for part, module in modules.items():
        config = getattr(module, "peft_config", {}).get(_ADAPTER)
        if config is None:
            continue
        for name, weight in convert_state_dict_to_diffusers(get_peft_model_state_dict(module)).items():
            weights[f"{part}.{_hub_name(part, name)}"] = weight.detach().to("cpu", dtype).contiguous()
        about |= {f"{part}.{key}": getattr(config, key) for key in _CONFIG}
        about[f"{part}.target_modules"] = sorted(config.target_modules)
    safetensors.torch.save_file(weights, path, metadata={METADATA: json.dumps(about, sort_keys=True)})


class TokenEmbedding(torch.nn.Module):
    """An embedding table of which one row is learned, in float32, and no other one can move."""

    def __init__(self, table: torch.nn.Embedding, number: int) -> None:
        super().__init__()
        self.table, self.number = table.requires_grad_(False), number
        self.learned = torch.nn.Parameter(table.weight[number].detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The frozen table, for callers that read its dtype or device."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look (B, L) up; the learned row stands where its number does."""
        rows: Tensor = self.table(input_ids)
        return torch.where((input_ids == self.number)[..., None], self.learned.to(rows.dtype), rows)


def add_token(tokenizer: Any, encoder: Any, token: str) -> int:
    """Make a word a token of its own, with a new row of embeddings; return its number.

    Raises:
        TrainingError: the vocabulary has it already.
    """
    from tokenizers import AddedToken

    if token in tokenizer.get_vocab():
        raise TrainingError(
            f"subjects.identifier: {token!r} is a token of the base already; a new embedding needs a new word, for "
            f"example <{token.strip('<>')}-1>"
        )
    tokenizer.add_tokens([AddedToken(token, single_word=True, normalized=True)])
    number: int = tokenizer.convert_tokens_to_ids(token)
    if number >= encoder.get_input_embeddings().num_embeddings:
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _pool_at(encoder, tokenizer.eos_token_id)
    return number


def _pool_at(encoder: Any, end: int) -> None:
    """Let an encoder pool at the end of the prompt.

    Configs of old bases say 2, for which transformers pools at the largest number: that of a new word.
    """
    encoder.config.eos_token_id = end
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = end


@torch.no_grad()
def set_embedding(encoder: Any, number: int, vector: Tensor) -> None:
    """Write one row of an encoder's embeddings."""
    table = encoder.get_input_embeddings().weight
    table[number] = vector.to(table)


@torch.no_grad()
def mean_embedding(tokenizer: Any, encoder: Any, words: str) -> Tensor:
    """Return the mean embedding of words, a place to begin from (Gal et al. 2023, section 4.1)."""
    numbers = tokenizer(words, add_special_tokens=False).input_ids
    mean: Tensor = encoder.get_input_embeddings().weight[numbers].float().mean(0)
    return mean


def save_embeddings(path: Path, token: str, vectors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write the embedding of a token as diffusers reads it: under the token, or of SDXL as clip_l and clip_g.

    Args:
        path: of the file; its metadata names the token.
        token: the new word.
        vectors: (D,) by text encoder, in the order of the family.
        dtype: of the saved rows.
    """
    rows = [vector.detach().to("cpu", dtype)[None].contiguous() for vector in vectors.values()]
    names = (token,) if len(rows) == 1 else CLIP_KEYS
    safetensors.torch.save_file(dict(zip(names, rows, strict=True)), path, metadata={"token": token})


def load_embeddings(path: Path) -> tuple[str, list[Tensor]]:
    """Return a token and its embeddings, (D,) for each text encoder.

    Raises:
        ModelError: the file is torn.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            token = file.metadata()["token"]
            names = [token] if token in file.keys() else CLIP_KEYS  # noqa: SIM118 - no mapping
            return token, [file.get_tensor(name)[0] for name in names]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no embedding of this program ({error}); train again") from error


def _hub_name(part: str, name: str) -> str:
    """Return a weight's name as on the hub: CLIPTextModel of new versions has dropped a level in memory."""
    if name.endswith(".lora_magnitude_vector"):
        name += ".weight"  # without it diffusers drops that of a text encoder
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
