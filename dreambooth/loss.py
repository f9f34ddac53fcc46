"""The mathematics of the training: noise, target, weights, and the loss of equation 2.

B rows, C latent channels, H height, W width; T training timesteps. Everything here is float32: in bfloat16 sigma
is 0 at the first timesteps, and a thousand noise levels collapse to two hundred.
"""

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return sqrt(a) x + sqrt(1 - a) noise (Ho et al. 2020, equation 4).

    Args:
        latents: (B, C, H, W) x.
        noise: (B, C, H, W) standard normal.
        alpha_bar: (B,) a, the cumulative product of the noise schedule at each row's timestep.
    """
    a = _rows(alpha_bar)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def prediction_target(prediction_type: PredictionType, latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return what the UNet should predict, (B, C, H, W).

    "epsilon": the noise (Ho et al. 2020). "v_prediction": sqrt(a) noise - sqrt(1 - a) x (Salimans & Ho 2022).
    """
    if prediction_type == "epsilon":
        return noise
    a = _rows(alpha_bar)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def min_snr_weights(prediction_type: PredictionType, alpha_bar: Tensor, gamma: float | None) -> Tensor:
    """Return (B,) weights that cap the signal-to-noise ratio at gamma (Hang et al. 2023, section 3.4).

    snr = a / (1 - a). For epsilon min(snr, gamma) / snr, for v min(snr, gamma) / (snr + 1). gamma None: ones.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, and its limit 1 where snr is 0
    return snr.clamp(max=gamma) / (snr + 1)


def row_losses(model_pred: Tensor, target: Tensor, huber_c: float | None = None) -> Tensor:
    """Return (B,) mean error of each row of (B, C, H, W), in float32: squared, or pseudo-Huber.

    Pseudo-Huber: 2 c (sqrt(d^2 + c^2) - c), which is d^2 for d << c and 2 c |d| beyond (Khrapov et al. 2024).
    """
    squares = (model_pred.float() - target.float()).square()
    if huber_c is not None:
        squares = 2 * huber_c * ((squares + huber_c**2).sqrt() - huber_c)
    return squares.flatten(1).mean(1)


def dreambooth_loss(losses: Tensor, weights: Tensor, instances: Tensor) -> Tensor:
    """Return sum(w l) / number of instance rows (Ruiz et al. 2022, equation 2): lambda is in the weight of a prior row.

    Args:
        losses: (B,) of each row.
        weights: (B,) of each row.
        instances: number of instance rows, also of those that come in another batch of the same step; at least 1.
    """
    return (weights * losses).sum() / instances


def _rows(values: Tensor) -> Tensor:
    """Shape (B,) as (B, 1, 1, 1)."""
    return values.float()[:, None, None, None]
