"""Compare embeddings: how like subject and prompt, how varied, how near a photo, how far from the base, how sure.

Dimension key: P prompts, S seeds of a prompt, N real photos, M pairs of images, A and B any rows, D embedding width.

Rows need no unit length. NaN, infinity and rows of zeros raise ValueError in every function: no score is made of them.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats

COPY_DISTANCE = 8  # bits of a 63-bit perceptual hash at or under which a picture is a copy: 0 false in 156 photos
COPY_MARGIN = 0.02  # cosine above the most similar pair of photos, where copies were measured
# Where they were not: a copy is so many times nearer to a photo than the two nearest photos are to each other. Measured
# on 30 subjects with Lite0 (docs/log.md): of other photos 2 % lie nearer, of those above pair and margin 27 to 42 %.
COPY_NEARER = 2.5
COPY_LENIENCY = 0.03  # cosine; with Lite0 up to .95, above which re-saved and mirrored photos still are


class Interval(NamedTuple):
    """A mean of `n` values and its two-sided confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compare every row of `a` (..., A, D) with every row of `b` (B, D): (..., A, B) in [-1, 1]."""
    return (_unit(a) @ _unit(b).T).clamp(-1, 1)


def identity(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Score subject fidelity: the mean cosine of each image with all real photos.

    Args:
        generated: (P, S, D), images of the prompts.
        real: (N, D), photos of the subject; N >= 1.

    Returns:
        (P, S) in [-1, 1].

    Source: Ruiz et al. 2022, section 4, there with DINO and CLIP-I; of "a {class_noun}" images this is their PRES.
    """
    return cosine(generated, real).mean(dim=-1)


def prompt_fidelity(generated: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Score each image against its own prompt, given without the identifier, which no image-text encoder knows.

    Args:
        generated: (P, S, D), images of the prompts.
        prompts: (P, D), the prompts with the class noun alone.

    Returns:
        (P, S) in [-1, 1].

    Source: Ruiz et al. 2022, section 4, there with CLIP (CLIP-T). Compare with the base at the same prompt and seed.
    """
    if len(generated) != len(prompts):
        raise ValueError(f"images of {len(generated)} prompts but {len(prompts)} prompts")
    return torch.einsum("psd,pd->ps", _unit(generated), _unit(prompts)).clamp(-1, 1)


def ceiling(real: torch.Tensor) -> float:
    """Score each real photo (N, D), N >= 2, against the others and average: what a perfect model could expect.

    Source: Ruiz et al. 2022, table 1, real images. Two photos that are nearly the same raise it.
    """
    return _mean_cosine(real, "photos").item()


def calibrated(score: float, floor: float, ceiling: float) -> float:
    """Place a mean score between the base model and the real photos: 0 at `floor`, 1 at `ceiling`, outside is possible.

    Calibrate means, never single images: the mean of ratios follows the images whose floor is nearest the ceiling.
    """
    if not all(map(math.isfinite, (score, floor, ceiling))):
        raise ValueError(f"score {score}, floor {floor}, ceiling {ceiling}: expected finite numbers")
    if ceiling <= floor:
        raise ValueError(
            f"ceiling {ceiling:.3f} is not above floor {floor:.3f}: no scale between them; show the raw score"
        )
    return (score - floor) / (ceiling - floor)


def diversity(generated: torch.Tensor) -> torch.Tensor:
    """Score variety: 1 - the mean cosine between the seeds of a prompt; (P, S, D), S >= 2, to (P,) in [0, 2].

    It stands for DIV of Ruiz et al. 2022, section 4, which is LPIPS: compare with the base model, not the paper.
    """
    return 1 - _mean_cosine(generated, "seeds of a prompt")


def copy_cosine(real: torch.Tensor, measured: float | None) -> float:
    """Return the cosine above which an image is a copy: above that of the two most similar photos, which are none.

    Args:
        real: (N, D), N >= 2, photos of the subject.
        measured: what separated copies from other photos with this encoder; None if that was never tried.

    Returns:
        A measured value is raised to the most similar pair and COPY_MARGIN, by COPY_LENIENCY at most: photos of a
        series are so alike that they would let every copy pass. Where nothing was measured, the distance of that pair
        from 1, divided by COPY_NEARER: one more photo is nearer than all pairs of N with a chance of 2 / (N + 1).
    """
    if len(real) < 2:
        raise ValueError(f"pairs need at least 2 photos, got {len(real)}")
    nearest = cosine(real, real).fill_diagonal_(-1).max().item()
    if measured is None:
        return 1 - (1 - nearest) / COPY_NEARER
    return min(max(nearest + COPY_MARGIN, measured), measured + COPY_LENIENCY)


def copies(nearest_cosine: torch.Tensor, distance: NDArray[np.int64], threshold: float) -> NDArray[np.bool_]:
    """Tell which images repeat a photo: too near in embedding, or in perceptual hash.

    Args:
        nearest_cosine: (...), with the most similar photo or its mirror image.
        distance: (...), fewest differing bits of the 63-bit perceptual hashes of image and photo or its mirror image.
        threshold: cosine above which it is a copy.

    Raises:
        ValueError: a cosine is not finite.
    """
    if not nearest_cosine.isfinite().all():
        raise ValueError(f"nearest cosines hold NaN or infinity at {_rows(~nearest_cosine.isfinite())}")
    return np.asarray((nearest_cosine.numpy() > threshold) | (distance <= COPY_DISTANCE))


class Discrepancy(NamedTuple):
    """The squared maximum mean discrepancy of two sets of images, and how often chance alone gives as much."""

    mmd2: float
    """Unbiased, so that it may be negative; 0 is expected of equal models."""
    p_value: float


def discrepancy(base: torch.Tensor, tuned: torch.Tensor, permutations: int = 999, seed: int = 0) -> Discrepancy:
    """Measure how far the images of a tuned model are from those of its base, drawn at the same seeds.

    The two images of a seed are not independent, so chance is simulated by exchanging them with each other, which
    turns the sign of their row and column of h.

    Args:
        base: (M, D), M >= 2, one image a seed.
        tuned: (M, D), images of the same seeds in the same order.
        permutations: of the test; the smallest p-value is 1 / (permutations + 1).
        seed: of the permutations.

    Source: Gretton et al. 2012, equation 4 (the U-statistic of pairs); RBF kernel, median heuristic.
    """
    if base.shape != tuned.shape or len(base) < 2:
        raise ValueError(f"shapes {tuple(base.shape)} and {tuple(tuned.shape)}: expected the same, with 2 rows or more")
    pairs, rows = len(base), torch.cat([_unit(base), _unit(tuned)]).double()
    squared = torch.cdist(rows, rows).square()
    between = squared[~torch.eye(2 * pairs, dtype=torch.bool)]
    width = between[between > 0].median().item() if (between > 0).any() else 1.0
    kernel = torch.exp(-squared / width)
    cross = kernel[:pairs, pairs:]
    h = (kernel[:pairs, :pairs] + kernel[pairs:, pairs:] - cross - cross.T).fill_diagonal_(0)
    signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, pairs)))
    observed = h.sum().item()
    as_much = (torch.einsum("ri,ij,rj->r", signs, h, signs) >= observed - 1e-12).sum().item()
    return Discrepancy(observed / (pairs * (pairs - 1)), (1 + as_much) / (1 + permutations))


def paired_interval(differences: torch.Tensor, confidence: float = 0.95) -> Interval:
    """Bound the mean of paired differences by a two-sided t interval.

    Prompts are the unit, not images: seeds of one prompt are not independent, so an interval over images is too narrow.

    Args:
        differences: (P,), one mean over seeds for each prompt, P >= 2.
        confidence: In (0, 1); .95 leaves .025 on each side.

    Raises:
        ValueError: Fewer than 2 prompts, a value that is not finite, or another shape.

    Source: Student 1908; mean +- t[n - 1] * s / sqrt(n), s with n - 1.
    """
    if differences.ndim != 1:
        raise ValueError(f"differences have shape {tuple(differences.shape)}, expected (P,): average over seeds first")
    n = len(differences)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 prompts, got {n}")
    if not differences.isfinite().all():
        raise ValueError(f"differences hold NaN or infinity at prompts {_rows(~differences.isfinite())}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    values = differences.double()
    mean = values.mean().item()
    half_width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * values.std().item() / math.sqrt(n)
    return Interval(mean, mean - half_width, mean + half_width, n)


def widened(half_width: float, n: int, confidence: float, comparisons: int) -> float:
    """Return the half width of a t interval that holds for all of several comparisons at once.

    Args:
        half_width: of one interval of n paired differences.
        n: how many differences, 2 or more.
        confidence: of that interval.
        comparisons: how many intervals are looked at; one of them shall be wrong as rarely as a single one was.

    Source: Bonferroni 1936 (Dunn 1961): each at the confidence 1 - (1 - confidence) / comparisons.
    """
    one, all_of_them = (float(stats.t.ppf(1 - (1 - confidence) / (2 * count), n - 1)) for count in (1, comparisons))
    return half_width * all_of_them / one


def _mean_cosine(embeddings: torch.Tensor, what: str) -> torch.Tensor:
    """Average the cosine over the pairs of different rows: (..., A, D), A >= 2, to (...)."""
    rows = embeddings.shape[-2]
    if rows < 2:
        raise ValueError(f"pairs need at least 2 {what}, got {rows}")
    unit = _unit(embeddings)
    upper = torch.triu_indices(rows, rows, offset=1)
    return (unit @ unit.mT).clamp(-1, 1)[..., upper[0], upper[1]].mean(dim=-1)


def _unit(embeddings: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1, or refuse those that have no direction."""
    if 0 in embeddings.shape:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)} are empty")
    length = embeddings.norm(dim=-1)
    bad = ~length.isfinite() | (length == 0)
    if bad.any():
        raise ValueError(f"embeddings hold NaN, infinity or only zeros in rows {_rows(bad)}")
    return F.normalize(embeddings, dim=-1)


def _rows(bad: torch.Tensor) -> str:
    """Name the first places where `bad` is true."""
    places = [tuple(place) if len(place) > 1 else place[0] for place in bad.nonzero().tolist()]
    return ", ".join(map(str, places[:5])) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
