"""Each photo is encoded once, to the distribution that the autoencoder gives it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_project import make_photo

from dreambooth.latents import cache_key, encode_image, encode_images
from dreambooth.models import Model, load_model


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def test_mean_and_std_are_those_of_the_autoencoder(model: Model) -> None:
    photo = make_photo(1, 32)
    batch = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = model.vae.encode(batch).latent_dist
    posterior = encode_image(model, photo)
    scale = model.vae.config.scaling_factor
    assert torch.allclose(posterior.mean, expected.mean[0] * scale, atol=1e-6)
    assert torch.allclose(posterior.std, expected.std[0] * scale, atol=1e-6)


def test_the_second_time_nothing_is_encoded(model: Model, tmp_path: Path) -> None:
    photos = [make_photo(i, 32) for i in range(3)]
    first, reused = encode_images(lambda: model, photos, "vae", model.device, tmp_path)
    assert reused == 0
    second, reused = encode_images(lambda: pytest.fail("loaded"), photos[::-1], "vae", model.device, tmp_path)
    assert reused == 3
    for one, two in zip(first, second[::-1], strict=True):
        assert torch.equal(one.mean, two.mean)
        assert torch.equal(one.std, two.std)


def test_a_torn_file_is_encoded_again(model: Model, tmp_path: Path) -> None:
    photos = [make_photo(0, 32)]
    first, _ = encode_images(lambda: model, photos, "vae", model.device, tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:50])
    second, reused = encode_images(lambda: model, photos, "vae", model.device, tmp_path)
    assert reused == 0
    assert torch.equal(first[0].mean, second[0].mean)


def test_another_picture_or_autoencoder_has_another_key(model: Model) -> None:
    keys = {
        cache_key(make_photo(0, 32), "vae", model.device),
        cache_key(make_photo(1, 32), "vae", model.device),
        cache_key(make_photo(0, 32), "other", model.device),
        cache_key(make_photo(0, 64), "vae", model.device),
    }
    assert len(keys) == 4
