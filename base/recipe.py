"""The values of the recipe: ``base/params.yaml`` as strict, frozen models, and where its files lie."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

SCRATCH = Path(".scratch/base")
"""Intermediate files: git-ignored, can be made again."""
MODEL = Path("data/base/emoji64")
"""The pipeline that the recipe makes, in git."""
SCORER = Path("data/base/scorer")
"""The image-text head of the evaluation, in git."""
SUBJECTS = Path("data/subjects")
"""The demo subjects, in git."""
PARAMS = Path(__file__).with_name("params.yaml")
IDENTIFIERS = ("sks", "zwx", "ohwx", "bnha")
"""Rare words in use as identifiers, in no caption; the first is that of the paper's reference implementations."""

Channel = Annotated[int, Field(ge=0, le=255)]
Positive = Annotated[int, Field(gt=0)]
Precision = Literal["no", "bf16"]
"""Of the matrix products; weights, losses and optimizer stay in float32."""
Rate = Annotated[float, Field(gt=0, le=0.1)]
RGB = tuple[Channel, Channel, Channel]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """A section: unknown keys are mistakes, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Package(Strict):
    """A pinned npm package of the Iconify project: one hand's drawings of every emoji."""

    version: str
    integrity: str
    """What npm publishes as ``dist.integrity``: ``sha512-`` and the digest in base64."""
    licence: str
    attribution: str


class FurtherPackage(Package):
    """A package of which only the scorer learns; it has other names, and sometimes several drawings of one thing."""

    names: dict[str, list[str]]
    """Its names of an icon of the recipe; an icon that is not listed has the same name, with or without hyphens."""


class Scene(Strict):
    """A background drawn from an icon, and the colour behind its transparent parts."""

    icon: str
    sky: RGB


class Subject(Strict):
    """A demo subject: one drawing, kept out of all training together with its near twins."""

    package: str
    icon: str
    class_noun: str
    contexts: list[str]
    """The background of each picture: a colour or a scene."""


class Pictures(Strict):
    """How a picture is composed; shares of all pictures."""

    seed: int
    colour_share: Share
    scene_share: Share
    """The rest is on white, or any plain colour that the caption does not name."""
    tint_share: Share
    """"a red dog": the hue shifted, of pictures that are not on white."""
    accessory_share: Share
    neighbour_share: Share
    size_share: Share
    """"a small dog", "a large dog"."""
    style_share: Share
    """"a 3d dog", of the drawings whose hand has a word in `styles`."""
    rare_share: Share
    """"a qvx dog": a made-up word before the noun that changes nothing, so that an identifier which no caption
    contains leaves the noun what it is."""


class Autoencoder(Strict):
    """Training of the AutoencoderKL; source of the values: measured on two CPU cores."""

    block_out_channels: list[Positive]
    latent_channels: Positive
    rows: Positive
    batch_size: Positive
    learning_rate: Rate
    final_learning_rate: Rate
    decoder_rows: Positive
    """Pictures of a further training of the decoder alone."""
    decoder_learning_rate: Rate
    warmup_steps: Positive
    kl_weight: Annotated[float, Field(ge=0)]
    ema_decay: Share
    mixed_precision: Precision
    seed: int


class TextEncoder(Strict):
    """The CLIPTextModel and the CLIPTokenizer."""

    vocab_size: Positive
    max_length: Positive
    hidden_size: Positive
    layers: Positive
    heads: Positive
    captions: Positive
    steps: Positive
    batch_size: Positive
    learning_rate: Rate
    seed: int


class Phase(Strict):
    """One stretch of the training of the denoiser, at one size."""

    resolution: Positive
    rows: Positive
    batch_size: Positive


class Denoiser(Strict):
    """Training of the UNet; the text encoder was taught before, and is frozen."""

    block_out_channels: list[Positive]
    attention_head_dim: Positive
    pool: Positive
    """Pictures whose latents are encoded once and drawn from."""
    phases: list[Phase]
    learning_rate: Rate
    final_learning_rate: Rate
    warmup_steps: Positive
    round_steps: Positive
    """Steps between two averagings of the processes' weights."""
    caption_dropout: Share
    snr_gamma: Annotated[float, Field(ge=0)]
    """Hang et al. 2023; 0: every timestep weighs the same."""
    ema_decay: Share
    mixed_precision: Precision
    max_grad_norm: Annotated[float, Field(gt=0)]
    seed: int


class Scorer(Strict):
    """Training of the image-text scorer; source of the values: measured on the held-out hand."""

    held_out_package: str
    """The hand that measures the scorer and that it never sees."""
    held_out_rows: Positive
    packages: dict[str, FurtherPackage]
    """Hands that neither the base model nor its judge ever sees."""
    rows: Positive
    pictures: Pictures
    """More of what is rare in the training of the denoiser: every word needs its examples."""
    extra_weight: Annotated[float, Field(gt=0)]
    """How often an extra drawing is the noun; a noun of the recipe is 1."""
    more_hands: Annotated[int, Field(ge=0)]
    """Redrawn copies of every drawing, beside the drawing itself."""
    decoded_share: Share
    """Pictures that go through the autoencoder of the base model instead of being softened."""
    mixed_precision: Precision
    """Of the Lite0 features that it learns from; they are measured and used in float32."""
    hidden_size: Positive
    width: Positive
    """Of the space in which pictures and texts meet."""
    temperature: Annotated[float, Field(gt=0)]
    label_smoothing: Share
    dropout: Share
    steps: Positive
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    seed: int


class Judge(Strict):
    """Training of the judge: a CNN of its own, from nothing; source of the values: measured on one core."""

    block_out_channels: list[Positive]
    pool: Positive
    """Composed pictures that it learns from."""
    rows: Positive
    """How many it is shown, each several times and half of them mirrored."""
    fresh_rows: Positive
    """Composed pictures that measure it."""
    batch_size: Positive
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    seed: int


class Quality(Strict):
    """What the finished model is asked to draw."""

    prompts: Positive
    """On colours, and as many in scenes."""
    seeds: Positive
    candidates: Positive
    """Nouns among which the right one has to win."""
    seed: int


class Recipe(Strict):
    """All of ``base/params.yaml``."""

    packages: dict[str, Package]
    sprite_size: Positive
    resolution: Positive
    nouns: dict[str, list[str]]
    """The icons of each noun; an icon that a package lacks is skipped there."""
    noun_weights: dict[str, Annotated[float, Field(gt=0)]]
    """How often a noun is drawn, 1 where it is not named."""
    scenes: dict[str, Scene]
    """The scene of each phrase, as "in space"."""
    colours: dict[str, RGB]
    accessories: dict[str, str]
    neighbours: dict[str, str]
    styles: dict[str, str]
    """The word for how a package draws, where it has one."""
    faces: list[str]
    """Icons whose head fills the drawing: only they wear accessories."""
    extra_icons: list[str]
    """Further drawings that only the autoencoder sees, so that it serves more nouns later."""
    subjects: dict[str, Subject]
    held_out: list[str]
    """"package:icon", by its name there: subjects, earlier ones, and every drawing that is nearly the same."""
    pictures: Pictures
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    denoiser: Denoiser
    scorer: Scorer
    judge: Judge
    quality: Quality

    @property
    def all_packages(self) -> dict[str, Package]:
        """Those of the base model and those of the scorer."""
        return {**self.packages, **self.scorer.packages}


def load(path: Path = PARAMS) -> Recipe:
    """Read and check the values of the recipe."""
    return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
