"""Read params.yaml into strict, frozen, typed parameters; refuse it with every fault at once.

Ranges are part of the types; units and sources stand under each field. Values live in params.yaml only.
"""

import copy
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dreambooth.errors import ParamsError, SubjectError, shown
from dreambooth.identifiers import identifier_fault
from dreambooth.redaction import looks_secret, redact
from dreambooth.yaml12 import YamlError, load_yaml

RESERVED_IDS = ("classes",)  # build/classes has the class images
ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,40}$"
MAX_BYTES = 1 << 20
MAX_AUTOMATIC_STEPS = 1200  # of a training whose length follows from the number of photos
MIN_PROMPTS = 6  # under this an interval over prompts says little, and no model is promoted on it
# What a sampler may be told, here and by whoever asks a registered model for pictures.
SAMPLER_STEPS = (1, 999)  # at 1000 DPM-Solver++ has a timestep twice, and divides by their distance
GUIDANCE = (0, 50)
SIDE = (32, 2048)
SIDE_UNIT = 8  # so many pixels wide is what one latent stands for


def _multiple_of_8(value: int) -> int:
    if value % SIDE_UNIT:
        raise ValueError(f"should be a multiple of {SIDE_UNIT}")
    return value


def _one_line(value: str) -> str:
    if value != value.strip() or not value.isprintable():
        raise ValueError("should be one line without control characters or outer blanks")
    return value


def _with_place(value: str) -> str:
    if "{}" not in value:
        raise ValueError("should hold {} where the subject stands")
    return value


Id = Annotated[str, Field(pattern=ID_PATTERN)]
Words = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
Template = Annotated[Words, AfterValidator(_with_place)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
SamplerSteps = Annotated[int, Field(ge=SAMPLER_STEPS[0], le=SAMPLER_STEPS[1])]
Guidance = Annotated[float, Field(ge=GUIDANCE[0], le=GUIDANCE[1])]
Side = Annotated[int, Field(ge=SIDE[0], le=SIDE[1]), AfterValidator(_multiple_of_8)]
Scheduler = Literal["dpmsolver++", "ddim", "pndm", "euler"]
WITHOUT_ZERO_SNR = ("pndm",)  # solvers whose class in diffusers passes over rescale_betas_zero_snr
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of params.yaml: frozen, strict, no unknown key."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Base(Section):
    """The untouched model that every subject starts from."""

    pretrained_model_name_or_path: Words
    """A folder in the project (data/base/...), or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None
    """Commit of a hub model, 40 hexadecimal digits: a branch may move. null for a folder."""
    resolution: Side
    """Side of the square pictures, in pixels: what the base was made for (bundled 64, SD1.5 512, SD2 768)."""
    inference_dtype: Dtype
    """Precision of drawing class and evaluation images; float16 or bfloat16 on a GPU."""


class ClassParams(Section):
    """A class: what the subjects are instances of."""

    class_noun: Words
    """The word, or the words, the base model knows the class by."""


class SubjectParams(Section):
    """A subject: what its photos show and what it is called."""

    class_id: Id
    """Key in `classes`."""
    identifier: Annotated[str, Field(pattern=r"^\S{1,40}$"), AfterValidator(_one_line)]
    """The rare word that will mean this subject (Ruiz et al. 2022, section 3.2)."""
    kind: Literal["live", "object", "person"]
    """Chooses the evaluation prompts, <evaluate.prompts>/<live or object>.csv; a person needs a consent as well."""

    @property
    def prompt_kind(self) -> Literal["live", "object"]:
        """Which evaluation prompts: those for animals are those for people."""
        return "object" if self.kind == "object" else "live"


class Photos(Section):
    """Which photos `validate` accepts."""

    min_count: Annotated[int, Field(ge=2)]
    """Fewest usable photos of a subject (Ruiz et al. 2022 use 3 to 5); one alone has no likeness to compare with."""
    max_count: Annotated[int, Field(ge=2, le=10_000)]
    """Most files of a subject, counted before one is decoded."""
    max_bytes: Annotated[int, Field(ge=1024)]
    """Largest file, in bytes."""
    max_total_bytes: Annotated[int, Field(ge=1024)]
    """All files of a subject together, in bytes."""
    max_pixels: Annotated[int, Field(ge=4096, le=89_000_000)]
    """Most pixels (width x height), checked before any pixel is decoded; Pillow calls 89,478,485 a bomb."""
    max_frames: Annotated[int, Field(ge=1, le=10_000)]
    """Most frames of an animation, of which the first is used."""
    min_side: Annotated[int, Field(ge=8)]
    """Shortest side that is not refused, in pixels."""
    max_aspect: Annotated[float, Field(ge=1)]
    """Longest side / shortest side above which the square crop loses too much: a warning."""
    min_sharpness: Annotated[float, Field(ge=0)]
    """Variance of the Laplacian, in squared grey levels, under which a photo is called blurred: a warning. Sharp photos
    have above 150, the same ones blurred by a hundredth of their side under 10."""
    min_brightness: Annotated[float, Field(ge=0, le=255)]
    """Mean grey level, of 255, under which a photo is called dark: a warning."""
    max_brightness: Annotated[float, Field(ge=0, le=255)]
    """Mean grey level above which a photo is called too bright: a warning."""
    min_contrast: Annotated[float, Field(ge=0, le=127)]
    """Standard deviation of the grey levels under which a picture shows nothing and is refused."""
    duplicate_distance: Annotated[int, Field(ge=0, le=63)]
    """Hamming distance of 63-bit perceptual hashes at or under which two photos are one (mirrored ones too)."""
    min_distance: Annotated[float, Field(ge=0, le=63)]
    """Mean Hamming distance between the photos under which they are called alike: a warning. Photos of one subject in
    different places have about 31."""
    prepared_side: Annotated[int, Field(ge=64, le=8192)]
    """Shorter side to which larger photos are scaled down when they are prepared; at least base.resolution."""


class Prior(Section):
    """What keeps the class as it is, and how class images are drawn from the base model."""

    kind: Literal["images", "teacher", "folder", "none"]
    """images: drawn by the untouched base (Ruiz et al. 2022, section 3.3). teacher: no images; what the base predicts
    for the photos under the class prompt is the target. folder: photos of your own. none: nothing. Without effect on
    train.method textual_inversion, which reads no class rows."""
    folder: Annotated[str, Field(pattern=r"^data/classes(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]
    """Where kind folder finds photos of a class, in <folder>/<class id>; checked as those of a subject are."""
    num_class_images: Annotated[int, Field(ge=0, le=100_000)]
    """How many; 0 goes with prior_loss_weight 0. For photo-scale models 200 to 300 (diffusers, DreamBooth README); Ruiz
    et al. 2022, section 3.3, draw about 1000 and say that fewer do."""
    prompts: Annotated[list[Template], Field(min_length=1, max_length=1000)]
    """What drawn class images show: sentences with {} for the class noun, in turn. One, "a photo of {}", is the paper's
    choice; several keep what the base draws of the class in other places too (He et al. 2023)."""
    scheduler: Scheduler
    """Solver of the sampler."""
    num_inference_steps: SamplerSteps
    """Steps of the sampler; DPM-Solver++ needs 20-25 (Lu et al. 2022)."""
    guidance_scale: Guidance
    """Weight of classifier-free guidance (Ho & Salimans 2022); 1 switches it off."""
    negative_prompt: str
    """What the class images must not show; may be empty."""
    batch_size: Annotated[int, Field(ge=1, le=1024)]
    """Images drawn at once; part of the content key, because it changes the last bits of an image."""
    seed: Seed
    """Image i is drawn from the seed (seed, i)."""

    @property
    def named_prompts(self) -> list[tuple[str, str]]:
        """Return each prompt with its place."""
        return [(f"params.yaml: prior.prompts.{number}", template) for number, template in enumerate(self.prompts)]


LORA_METHODS = ("lora", "pivotal")
TOKEN_METHODS = ("textual_inversion", "pivotal")


class Train(Section):
    """The training of one subject. Defaults for photo-scale models: docs/recipes.md."""

    method: Literal["full", "lora", "textual_inversion", "pivotal"]
    """What is trained. full: all weights of the UNet (Ruiz et al. 2022). lora: low-rank updates of it (Hu et al.
    2022). textual_inversion: a new word for the identifier and nothing else (Gal et al. 2023); it reads no class rows,
    so that the prior has no effect. pivotal: both."""
    rank: Annotated[int, Field(ge=1, le=1024)]
    """Rank of the updates of lora and pivotal; 4 in diffusers' scripts, 4 to 128 are usual (kohya sd-scripts)."""
    lora_alpha: Annotated[float, Field(gt=0, le=1024)]
    """The updates count lora_alpha / rank."""
    use_dora: bool
    """Give each output of an updated layer a magnitude of its own (DoRA, Liu et al. 2024)."""
    seed: Seed
    """Every random number of the training is a function of (seed, purpose, step, row)."""
    max_train_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None
    """Optimizer steps; null: 100 a photo, at least 400, at most 1200."""
    train_batch_size: Annotated[int, Field(ge=1, le=1024)]
    """Instance rows in a forward pass; the model sees twice that with a prior."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)]
    """Forward passes in an optimizer step."""
    train_text_encoder: bool
    """Train the text encoders with the UNet (Ruiz et al. 2022 train both); textual_inversion leaves them alone."""
    optimizer: Literal["adamw", "adamw_8bit", "prodigy"]
    """adamw_8bit keeps the moments in 8 bits (Dettmers et al. 2022; pip install "dreambooth[adam8bit]").
    prodigy finds its own rate (Mishchenko & Defazio 2024; pip install "dreambooth[prodigy]")."""
    learning_rate: Annotated[float, Field(gt=0, le=1)]
    """Peak rate of the optimizer: 5e-6 for full (Ruiz et al. 2022), 2e-6 with the text encoder and 1e-4 for lora
    (diffusers, DreamBooth README), 5e-3 for textual_inversion (its authors' configuration); Prodigy wants 1."""
    text_encoder_learning_rate: Annotated[float, Field(gt=0, le=1)] | None
    """Peak rate of the text encoders; null: the same."""
    embedding_learning_rate: Annotated[float, Field(gt=0, le=1)] | None
    """Peak rate of the new word of textual_inversion and pivotal; null: the same."""
    lr_scheduler: Literal["constant", "linear", "cosine"]
    """Shape of the rate after the warm-up."""
    lr_warmup_steps: Annotated[int, Field(ge=0)]
    """Optimizer steps of linear warm-up."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    """Decay of the second moment."""
    adam_weight_decay: Annotated[float, Field(ge=0, le=1)]
    """Decoupled weight decay (Loshchilov & Hutter 2019)."""
    adam_epsilon: Annotated[float, Field(gt=0, le=1)]
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """Gradients are clipped to this norm over all trainable weights."""
    prior_loss_weight: Annotated[float, Field(ge=0, le=100)]
    """Weight of the class rows (lambda of Ruiz et al. 2022, equation 2); 0 trains without a prior."""
    snr_gamma: Annotated[float, Field(gt=0)] | None
    """Gamma of min-SNR weights (Hang et al. 2023; diffusers recommends 5); null weighs all timesteps alike."""
    mixed_precision: Literal["no", "bf16", "fp16"]
    """Autocast precision of the forward pass; weights, noise, target and loss stay in float32."""
    checkpointing_steps: Annotated[int, Field(ge=1)] | None
    """Optimizer steps between two checkpoints, the most that a killed training loses; null writes none."""
    halve_batch_on_out_of_memory: bool
    """Once, when the memory runs out: half the rows in a forward pass, twice as many passes; the same step within
    rounding."""
    evaluation_steps: Annotated[int, Field(ge=1)] | None
    """Optimizer steps between two measurements of the loss at fixed noise and timesteps; null measures none. With
    load_best_model_at_end the best so far is kept as a checkpoint of its own."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None
    """Measurements without a better one after which the training ends; null never ends it early."""
    load_best_model_at_end: bool
    """Ship the weights of the best measurement instead of the last ones. Its loss says little about the pictures
    (docs/decisions/0013)."""
    preview_steps: Annotated[int, Field(ge=1)] | None
    """Optimizer steps between two sets of previews, drawn from the weights in memory; null draws none."""
    preview_prompts: Annotated[list[Template], Field(max_length=64)]
    """What they show: sentences with {} for the subject. Each is drawn from a seed of its own, always the same."""
    preview_guidance_scale: Guidance
    """Weight of classifier-free guidance in previews."""
    gradient_checkpointing: bool | Literal["auto"]
    """Trade a third more compute for the memory of the UNet's activations; auto: once a step does not fit without."""
    huber_c: Annotated[float, Field(gt=0, le=10)] | None
    """Where the loss turns from squares to magnitudes (pseudo-Huber, Khrapov et al. 2024; 0.1 in kohya sd-scripts);
    null: squares."""
    noise_offset: Annotated[float, Field(ge=0, le=1)]
    """Standard deviation of what is added to a whole channel of the noise, for very dark and very bright pictures
    (Guttenberg 2023; 0.05 to 0.1); 0 adds nothing."""
    random_flip: bool
    """Train on mirror images of the photos too; not for a subject whose sides differ."""
    random_crops: Annotated[int, Field(ge=0, le=64)]
    """Squares of each photo besides the middle one, at random places along its longer side; each is encoded once."""
    aspect_buckets: bool
    """Train each photo at the size, of about resolution x resolution pixels, that is nearest to its proportions, in
    place of its middle square (NovelAI 2022; docs/decisions/0090). Class images and evaluation stay square."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    """Decay of a moving average of the weights, which is shipped in their place; null: the last weights."""
    allow_tf32: bool
    """Multiply float32 matrices with 10 bits of mantissa on GPUs that can (Ampere and later): several times as fast."""
    num_processes: Annotated[int, Field(ge=1, le=1024)]
    """Processes, one a GPU, that share the rows of a step: it has train_batch_size rows of each."""
    save_dtype: Dtype
    """Precision of the saved weights: these are evaluated, exported and served. Where a LoRA or a word is merged into a
    part of the base, float32 if base.inference_dtype is (docs/decisions/0091)."""

    @property
    def reads_class_rows(self) -> bool:
        """Whether class rows teach anything: their prompt lacks the new word, so a word alone learns nothing there."""
        return self.method != "textual_inversion"

    @property
    def adds_lora(self) -> bool:
        """Whether low-rank updates are trained."""
        return self.method in LORA_METHODS

    @property
    def learns_token(self) -> bool:
        """Whether the identifier becomes a new word with an embedding of its own."""
        return self.method in TOKEN_METHODS

    @property
    def trains_encoders(self) -> bool:
        """Whether the layers of the text encoders move."""
        return self.train_text_encoder and self.method != "textual_inversion"


class Evaluate(Section):
    """How the personalised model is compared with the base."""

    prompts: Annotated[str, Field(pattern=r"^data/prompts(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")]
    """Folder with live.csv and object.csv, in data/prompts."""
    max_prompts: Annotated[int, Field(ge=2, le=1000)] | None
    """At most so many, each kind in its share and in the order of its file; null takes all (25 are the standard)."""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=64)]
    """Every prompt is drawn once with each seed, by the base and by the personalised model. One leaves the diversity
    unmeasured, without which nothing takes the place of a champion."""
    encoders: Literal["bundled", "hub"]
    """bundled: Lite0 and the scorer of data/base, offline. hub: DINO ViT-S/16 and CLIP ViT-B/32, for photos."""
    num_class_images: Annotated[int, Field(ge=0, le=1000)]
    """Images of the class prompt by each model, for the prior drift (PRES); 50 are ample. 0 leaves it
    unmeasured, and then nothing takes the place of a champion."""
    class_seed: Seed
    """Class image i is drawn from the seed (class_seed, i); none of them is a class image of the training."""
    scheduler: Scheduler
    """Solver of the sampler."""
    num_inference_steps: SamplerSteps
    """Steps of the sampler."""
    guidance_scale: Guidance
    """Weight of classifier-free guidance."""
    batch_size: Annotated[int, Field(ge=1, le=1024)]
    """Images drawn at once."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    """Of the t interval over prompt means."""


Margin = Annotated[float, Field(ge=0, le=1)]


class Gate(Section):
    """What a new model must show before it takes the place of the champion; cosines of the encoders in use."""

    min_prompts: Annotated[int, Field(ge=MIN_PROMPTS)]
    """Fewest prompts that count for the identity; under 6 an interval says little."""
    min_gain: Margin
    """The identity's lower bound must be above it."""
    identity_margin: Margin
    """How much identity a model may lose whose prompt fidelity is better."""
    prompt_min_gain: Margin
    """The lower bound of the prompt fidelity of such a model must be above it."""
    prompt_margin: Margin
    """The lower bound of the prompt fidelity must be above minus this."""
    diversity_margin: Margin
    """The lower bound of the diversity must be above minus this."""
    pres_margin: Margin
    """The upper bound of the rise of PRES must be below this."""
    copy_rate: Margin
    """Largest share of images that repeat a photo."""
    first_prompt_drop: Margin
    """Largest mean loss of prompt fidelity of a first model against the base."""
    first_copy_rate: Margin
    """Largest share of images of a first model that repeat a photo."""


ExportFormat = Literal["diffusers", "single_file", "lora", "kohya", "embedding"]
METHODS_OF_FORMAT = {  # those that are missing here can hold what any method made
    "lora": LORA_METHODS,
    "kohya": LORA_METHODS,
    "embedding": TOKEN_METHODS,
}


def _with_diffusers(value: list[str]) -> list[str]:
    if "diffusers" not in value:
        raise ValueError("should hold diffusers, which is what is registered and served")
    if len(set(value)) < len(value):
        raise ValueError("should name each format once")
    return value


class Export(Section):
    """What an export holds."""

    formats: Annotated[list[ExportFormat], AfterValidator(_with_diffusers)]
    """diffusers: the pipeline as a folder. single_file: the same as one checkpoint in the original layout. lora, kohya:
    the LoRA alone, as diffusers and as kohya's trainer name it. embedding: the new word, as A1111 reads it."""
    dtype: Dtype
    """Precision of all but the diffusers folder, whose trained parts are as they were evaluated."""
    license: Words | None
    """Licence of the model, an id of the hub such as creativeml-openrail-m; null leaves it unsaid."""


TrackerName = Literal["tensorboard", "wandb"]


class Tracking(Section):
    """Who is told of a training beside MLflow. It changes no weight, and so runs no stage again."""

    report_to: list[TrackerName]
    """Trackers of accelerate that get the same losses, rates and previews, live; [] for none. They are extras:
    pip install 'dreambooth[tensorboard]', 'dreambooth[wandb]'."""


class Registry(Section):
    """How exports are registered."""

    max_logged_bytes: Annotated[int, Field(ge=0)]
    """A larger export is not copied into MLflow: the version points to where DVC keeps it, and holds the small parts
    that are of use alone (card, LoRA, word), up to so many together. Bytes."""


class Params(Section):
    """Everything in params.yaml."""

    base: Base
    classes: dict[Id, ClassParams]
    subjects: dict[Id, SubjectParams]
    photos: Photos
    prior: Prior
    train: Train
    evaluate: Evaluate
    gate: Gate
    export: Export
    tracking: Tracking
    registry: Registry

    @property
    def has_prior(self) -> bool:
        """Whether class rows are trained on: they are asked for, and the method can learn from them."""
        return self.prior.kind != "none" and self.train.prior_loss_weight > 0 and self.train.reads_class_rows

    @property
    def idle(self) -> list[str]:
        """Say what is set and changes nothing in a training, with the reason: it may not be what was meant."""
        return [*_idle_prior(self), *_idle_options(self.train)]

    def subject(self, subject_id: str) -> SubjectParams:
        """Return one subject; raise SubjectError with the known ones."""
        if subject_id not in self.subjects:
            raise SubjectError(_unknown("subject", subject_id, self.subjects, "dreambooth add ID PHOTOS --class-noun"))
        return self.subjects[subject_id]

    def prompts_file(self, subject_id: str) -> str:
        """Return the file, relative to the project, whose prompts the evaluation of a subject chooses from."""
        return f"{self.evaluate.prompts}/{self.subject(subject_id).prompt_kind}.csv"

    def class_of(self, subject_id: str) -> ClassParams:
        """Return the class of one subject."""
        return self.classes[self.subject(subject_id).class_id]


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises:
        ParamsError: with one line for every fault, each with its full field path.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ParamsError([f"{path}: larger than {MAX_BYTES} bytes; it should hold parameters only"])
        loaded = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError([f"{path} does not exist; run this in the folder of a project, beside dvc.yaml"]) from None
    except (YamlError, UnicodeDecodeError, OSError) as error:
        raise ParamsError([f"{path}: cannot be read: {' '.join(str(error).split())}{_remedy(error)}"]) from None
    if not isinstance(loaded, dict):
        raise ParamsError([f"{path}: should be a map of sections (got {type(loaded).__name__})"])
    return parse_params(loaded, path.name)


def parse_params(values: Mapping[str, Any], source: str = "params.yaml") -> Params:
    """Check a map of sections; raise ParamsError with every fault."""
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        mistyped = {(*fault["loc"][:-1], _near(fault["loc"])) for fault in faults if fault["type"] == "extra_forbidden"}
        told = [fault for fault in faults if not (fault["type"] == "missing" and fault["loc"] in mistyped)]
        raise ParamsError([shown(f"{source}: {_explain(fault)}") for fault in told]) from None
    problems = [*_secrets(values), *_contradictions(params)]
    if problems:
        raise ParamsError([shown(f"{source}: {problem}") for problem in problems])
    return params


def names_id(text: str, value: str) -> bool:
    """Tell whether an id stands in a text alone: rex in train@rex, not in rex-2, rex_2 or t-rex."""
    return re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", text) is not None


def check_id(value: str) -> str:
    """Return a subject or class id, or raise SubjectError: only such an id may become a path or a command line."""
    if value in RESERVED_IDS:
        raise SubjectError(f"{value!r} is no id of a subject: build/{value} is of all; choose another name")
    if not re.fullmatch(ID_PATTERN, value):
        raise SubjectError(
            f"{value!r} is not an id; use 1 to 41 of a-z, 0-9 and '-', not starting with '-' (for example: biscuit)"
        )
    return value


def with_values(content: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with some of them replaced: {"train.learning_rate": 2e-6}; `parse_params` judges the result.

    Raises:
        ParamsError: with every path that there is not.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    faults = []
    for path, value in values.items():
        *sections, name = path.split(".")
        part: Any = changed
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict) and sections and name in part:
            part[name] = value
            continue
        known = part if isinstance(part, dict) and sections else {}
        faults.append(f"{path}: there is no such parameter in params.yaml; {nearest_path(path, known)}")
    if faults:
        raise ParamsError(faults)
    return changed


def nearest_path(path: str, known: Iterable[str]) -> str:
    """Say which parameter an unknown path probably means, among the names that are known in its section."""
    section, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {section}.{near[0]}?" if near else "write section.name, such as train.seed"


def describe(path: str) -> list[str]:
    """Say what a parameter means, or each parameter of a section: train.rank, train.

    Raises:
        ParamsError: there is none of that name.
    """
    section, _, name = path.partition(".")
    if section not in Params.model_fields:
        raise ParamsError([_unknown("section", section, Params.model_fields, "a name such as train.seed")])
    kind: Any = Params.model_fields[section].annotation
    entries = get_args(kind)  # of a map: its keys, and what each of them holds
    fields = (entries[1] if entries else kind).model_fields
    wanted = name.rpartition(".")[2]
    if wanted and wanted not in fields:
        raise ParamsError([_unknown(f"parameter of {section}", wanted, fields, "a name such as train.seed")])
    start = f"{section}.ID" if entries else section
    return [
        f"{start}.{key}: {' '.join((field.description or '').split())}"
        for key, field in fields.items()
        if wanted in ("", key)
    ]


def format_faults(export: Export, method: str, use_dora: bool) -> Iterator[str]:
    """Name the formats that a training by this method does not fill, or that others read as another model."""
    for name in export.formats:
        methods = METHODS_OF_FORMAT.get(name)
        if methods and method not in methods:
            yield (
                f"export.formats: {name} holds what train.method {' or '.join(methods)} makes, and the method is "
                f"{method}; take it out, or train by another method"
            )
        elif name == "kohya" and use_dora:
            yield (
                "export.formats: kohya with train.use_dora is another model in ComfyUI and in A1111, which divide by "
                "other lengths than the training; take it out, single_file is for them and lora for diffusers"
            )


def scheduler_fault(name: str, about: Mapping[str, Any]) -> str | None:
    """Return why a solver cannot draw with a base, None if it can.

    Args:
        name: of the solver.
        about: scheduler_config.json of the base.
    """
    if name not in WITHOUT_ZERO_SNR or not about.get("rescale_betas_zero_snr"):
        return None
    others = ", ".join(one for one in get_args(Scheduler) if one not in WITHOUT_ZERO_SNR)
    return (
        f"scheduler {name} would draw on another noise schedule than that of the base, whose last step is noise alone "
        f"(rescale_betas_zero_snr); take one of {others}"
    )


def _remedy(error: Exception) -> str:
    """Say what mends a file that editors and other systems have written in a way of their own."""
    if isinstance(error, UnicodeDecodeError):
        return "; save it as UTF-8"
    return "; indent with spaces" if "'\\t'" in str(error) else ""


def _secrets(values: Any, where: str = "") -> Iterator[str]:
    """Find texts that are secrets: parameters stand in git, in MLflow and in every export."""
    if isinstance(values, Mapping | list):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _secrets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, str) and looks_secret(values):
        yield f"{where}: looks like a secret, which no parameter may be; take it out and set it in the environment"


def _contradictions(params: Params) -> Iterator[str]:
    """Faults that no single field shows."""
    for subject_id, subject in params.subjects.items():
        where = f"subjects.{subject_id}"
        if subject_id in RESERVED_IDS:
            yield f"{where}: build/{subject_id} is of all subjects; choose another name"
        if subject.class_id not in params.classes:
            yield f"{where}.class_id: " + _unknown("class", subject.class_id, params.classes, "add it to classes:")
        elif fault := identifier_fault(subject.identifier, params.classes[subject.class_id].class_noun):
            yield f"{where}.identifier: {fault}"
    photos = params.photos
    if photos.max_count < photos.min_count:
        yield f"photos.max_count: should be at least photos.min_count {photos.min_count} (got {photos.max_count})"
    yield from format_faults(params.export, params.train.method, params.train.use_dora)
    if photos.prepared_side < params.base.resolution:
        yield (
            f"photos.prepared_side: should be at least base.resolution {params.base.resolution} "
            f"(got {photos.prepared_side})"
        )
    if params.has_prior and params.prior.kind == "images" and params.prior.num_class_images == 0:
        yield "prior.num_class_images: 0 leaves train.prior_loss_weight without images; draw some, or write weight 0"
    steps = params.train.max_train_steps or MAX_AUTOMATIC_STEPS
    if params.train.lr_warmup_steps >= steps:
        yield f"train.lr_warmup_steps: {params.train.lr_warmup_steps} leave none of the {steps} steps at the full rate"
    yield from _needs_evaluation(params.train)
    if params.train.ema_decay is not None and params.train.load_best_model_at_end:
        yield "train.ema_decay: replaces the last weights, and load_best_model_at_end does too; choose one"
    if params.train.optimizer == "prodigy" and (
        params.train.text_encoder_learning_rate or params.train.embedding_learning_rate
    ):
        yield "train.optimizer: prodigy has one rate for all weights; write null for the other rates"
    if params.train.preview_steps is not None and not params.train.preview_prompts:
        yield f"train.preview_prompts: empty, but preview_steps is {params.train.preview_steps}; name one"
    if len(set(params.evaluate.seeds)) != len(params.evaluate.seeds):
        yield f"evaluate.seeds: the same seed stands twice in {params.evaluate.seeds}"


def _idle_prior(params: Params) -> Iterator[str]:
    """Name class images that are made and not trained on."""
    if params.has_prior or params.prior.kind == "none":
        return
    why = "train.prior_loss_weight 0" if params.train.reads_class_rows else f"train.method {params.train.method}"
    yield f"{why} reads no class rows: prior.kind {params.prior.kind} has no effect on it; prior.kind none " + (
        "says so" if params.prior.kind == "teacher" else "saves the time of the stage prior"
    )


def _idle_options(train: Train) -> Iterator[str]:
    """Name options of the training that its method, or another option, leaves without effect."""
    method = f"train.method {train.method}"
    if train.use_dora and not train.adds_lora:
        yield f"{method} has no LoRA: train.use_dora has no effect"
    if train.embedding_learning_rate is not None and not train.learns_token:
        yield f"{method} learns no new word: train.embedding_learning_rate has no effect"
    if train.method == "textual_inversion" and train.train_text_encoder:
        yield f"{method} trains the new word alone: train.train_text_encoder has no effect"
    if train.text_encoder_learning_rate is not None:
        if train.method == "textual_inversion":
            yield f"{method} trains the new word alone: train.text_encoder_learning_rate has no effect"
        elif not train.train_text_encoder:
            yield "train.train_text_encoder is false: train.text_encoder_learning_rate has no effect"
    if train.num_processes > 1 and train.gradient_checkpointing == "auto":
        yield (
            f"train.num_processes {train.num_processes}: train.gradient_checkpointing auto has no effect, one process "
            "cannot change alone; write true where a step does not fit"
        )


def _needs_evaluation(train: Train) -> Iterator[str]:
    """Faults of what hangs on the evaluation loss."""
    if train.evaluation_steps is None:
        if train.early_stopping_patience is not None:
            yield "train.early_stopping_patience: needs train.evaluation_steps; set it, or write null here"
        if train.load_best_model_at_end:
            yield "train.load_best_model_at_end: needs train.evaluation_steps; set it, or write false here"
    elif train.load_best_model_at_end and train.checkpointing_steps is None:
        yield "train.load_best_model_at_end: needs checkpoints; set train.checkpointing_steps, or write false here"


def _unknown(what: str, value: str, known: Mapping[str, Any], remedy: str) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}; or {remedy}"
    return f"there is no {what} {value!r}; {hint}"


def _explain(fault: Any) -> str:
    """Turn one pydantic error into: path, what it should be, what was got, and the remedy where one is known."""
    location, kind, got = fault["loc"], fault["type"], fault["input"]
    where = ".".join(str(part) for part in location if part != "[key]")
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {_nearest_key(location)}"
    if kind == "missing":
        return f"{where}: missing, as in a file of an older version; add it: python -m dreambooth.params {where}"
    if isinstance(got, str) and kind in ("float_type", "int_type") and _is_number(got):
        return f"{where}: should be a number (got the text {got!r}; drop the quotes)"
    message = re.sub(r"^(Value error, |Input |String )", "", fault["msg"])
    return f"{where}: {message} (got {redact(_short(got))})"


def _nearest_key(location: tuple[Any, ...]) -> str:
    near = _near(location)
    return f"did you mean {near}?" if near else f"known here: {', '.join(_keys_beside(location))}"


def _near(location: tuple[Any, ...]) -> str | None:
    """Return the key that an unknown one was probably meant to be."""
    return next(iter(difflib.get_close_matches(str(location[-1]), _keys_beside(location), n=1, cutoff=0.5)), None)


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    """Name the keys that may stand where an unknown one was found."""
    if len(location) == 1:
        return list(Params.model_fields)
    section: Any = Params.model_fields[location[0]].annotation
    entries = get_args(section)  # of a map: its keys, and what each of them holds
    return list((entries[1] if entries else section).model_fields)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


if __name__ == "__main__":  # python -m dreambooth.params train.rank
    try:
        sys.stdout.writelines(f"{line}\n" for one in sys.argv[1:] or Params.model_fields for line in describe(one))
    except ParamsError as error:
        sys.exit(f"{error.code}: {error}")
