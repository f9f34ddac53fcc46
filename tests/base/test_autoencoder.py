"""The training of the autoencoder, on a toy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from base import autoencoder, loop
from base.recipe import Recipe
from base.sprites import Sprites


class PowerCutError(RuntimeError):
    """The machine goes down."""


class Always(loop.Every):
    """A timer that is always due."""

    def due(self) -> bool:
        return True


def test_training_cut_in_two_gives_the_same_weights(
    values: Recipe, drawn: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = autoencoder.train(values, drawn, tmp_path / "whole.pt")
    cut, save = tmp_path / "cut.pt", loop.save

    def save_and_stop(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if state["rows"] == 12:
            raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Every", Always)
        patch.setattr(loop, "save", save_and_stop)
        with pytest.raises(PowerCutError):
            autoencoder.train(values, drawn, cut)
    resumed = autoencoder.train(values, drawn, cut)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_decoder_trains_on_while_the_encoder_stays(values: Recipe, drawn: Sprites, tmp_path: Path) -> None:
    start = autoencoder.build(values.autoencoder, values.resolution)
    before = {key: value.clone() for key, value in start.state_dict().items()}
    after = autoencoder.train(values, drawn, tmp_path / "decoder.pt", start=start).state_dict()
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"decoder"}


def test_to_tensor_maps_bytes_to_minus_one_and_one() -> None:
    pixels = np.zeros((1, 2, 2, 3), np.uint8)
    pixels[0, 0, 1] = 255
    got = autoencoder.to_tensor(pixels)
    assert got.shape == (1, 3, 2, 2)
    assert got[0, :, 0, :].tolist() == [[-1, 1]] * 3


def test_edge_loss_sees_a_blurred_edge_that_the_mean_does_not() -> None:
    target = torch.zeros(1, 1, 2, 4)
    stripes, flat = torch.tensor([1.0, 0, 1, 0]).expand(1, 1, 2, 4), torch.full((1, 1, 2, 4), 0.5)
    assert [term.item() for term in autoencoder.loss_terms(flat, target)] == [0.5, 0.0]
    assert [term.item() for term in autoencoder.loss_terms(stripes, target)] == [0.5, 1.0]


def test_scaling_factor_makes_the_latents_of_unit_variance(values: Recipe, drawn: Sprites) -> None:
    torch.manual_seed(0)
    model = autoencoder.build(values.autoencoder, values.resolution).eval()
    factor = autoencoder.scaling_factor(model, values, drawn, count=8)
    assert 0 < factor < 1e3
