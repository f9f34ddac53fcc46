"""DINO and CLIP: the classes of the hub with tiny random weights, and exactly the transforms of their authors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_project import make_photo, write_tokenizer

from dreambooth.encoders import ImageEncoder
from dreambooth.errors import ModelError
from dreambooth.hub_encoders import CLIP, DINO, IMAGENET_MEAN, IMAGENET_STD, ClipEncoder, DinoEncoder

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**WIDTH, image_size=224, patch_size=56), add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "model"
    write_tokenizer(folder)
    text = WIDTH | {
        "vocab_size": 514, "max_position_embeddings": 40, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    torch.manual_seed(0)
    vision = WIDTH | {"image_size": 224, "patch_size": 56}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


def by_hand(image: Image.Image, shorter: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Resize, crop and normalise with Pillow and numpy alone."""
    scale = shorter / min(image.size)
    size = (int(image.width * scale), int(image.height * scale))
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    cropped = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = (np.asarray(cropped, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def wide() -> Image.Image:
    return make_photo(3, 320).resize((320, 240))


def test_dino_is_the_class_token_of_the_transform_of_its_authors(dino_folder: Path) -> None:
    from transformers import ViTModel

    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    with torch.inference_mode():
        row = model(by_hand(wide(), 256, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0]
    torch.testing.assert_close(
        DinoEncoder(dino_folder).embed([wide()]), torch.nn.functional.normalize(row, dim=1), atol=1e-5, rtol=0
    )


def test_clip_is_the_projected_picture_of_the_transform_of_its_authors(clip_folder: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        row = model.get_image_features(by_hand(wide(), 224, CLIP_MEAN, CLIP_STD)).pooler_output
    found = ClipEncoder(clip_folder).embed_images([wide()])
    torch.testing.assert_close(found, torch.nn.functional.normalize(row, dim=1), atol=1e-5, rtol=0)


def test_rows_are_units_in_order_at_any_batch_size(dino_folder: Path, clip_folder: Path) -> None:
    photos = [make_photo(number) for number in range(3)]
    for encoder in (DinoEncoder(dino_folder), ClipEncoder(clip_folder)):
        rows = encoder.embed(photos)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
        alone = torch.cat([encoder.embed([photo], batch_size=1) for photo in photos])
        torch.testing.assert_close(rows, alone, atol=1e-5, rtol=0)
        assert not rows.requires_grad
        with pytest.raises(ValueError, match="no pictures"):
            encoder.embed([])


def test_clip_embeds_a_prompt_alike_alone_and_beside_a_longer_one(clip_folder: Path) -> None:
    encoder = ClipEncoder(clip_folder)
    both = encoder.embed_texts(["a dog", "a dog on a beach " * 9])
    torch.testing.assert_close(both[:1], encoder.embed_texts(["a dog"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
    assert both.shape[1] == encoder.embed([make_photo(0)]).shape[1]


def test_clip_can_tell_subjects_too_and_neither_had_its_copies_measured(dino_folder: Path, clip_folder: Path) -> None:
    encoders = (DinoEncoder(dino_folder), ClipEncoder(clip_folder))
    assert all(isinstance(encoder, ImageEncoder) and encoder.copy_cosine is None for encoder in encoders)


def test_the_hub_models_are_pinned_to_commits() -> None:
    assert [len(revision) for _, revision in (DINO, CLIP)] == [40, 40]


@pytest.mark.parametrize("encoder", [DinoEncoder, ClipEncoder])
def test_without_a_network_the_error_says_which_command_fetches_it(
    encoder: type[DinoEncoder] | type[ClipEncoder],
) -> None:
    with pytest.raises(ModelError, match=r"hf download .+ --revision [0-9a-f]{40}; or set evaluate.encoders: bundled"):
        encoder()
