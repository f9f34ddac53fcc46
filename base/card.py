"""Draw the contact sheet of the base model and write its model card."""

import argparse
import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from base import compose, denoiser, icons, quality, recipe
from base.recipe import Recipe

NOUNS = ("dog", "cat", "fox", "backpack", "teddy bear", "clock", "sneaker", "teapot", "rocket", "apple")
"""Of the sheet; cat to teapot, without the fox, are classes of the DreamBooth paper."""
CONTEXTS = ("", "blue", "red", "yellow", "in space", "on a beach", "in a park", "in a city")
TILE, LABEL = 64, 70
SHEET = "contact-sheet.png"

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji64: a small Stable Diffusion that draws

A text-to-image model of {size_mb:.0f} MB with the architecture of Stable Diffusion (AutoencoderKL, CLIPTokenizer,
CLIPTextModel, UNet2DConditionModel) that draws emoji-like pictures of {resolution} x {resolution} pixels from captions.
It is the base model of the demo and of the tests: small enough for two CPU cores and for git. It knows the words below
and nothing else; how well, is measured below.

![What it draws: a row for each noun, a column for each context]({sheet})

## Use
```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{path}")
image = pipeline("a photo of a fox in space", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
image.save("fox.png")
```
Captions that it was trained on: "a photo of a NOUN", "a picture of ..", "a drawing of ..", or the noun alone, then
nothing, "on a COLOUR background", or a scene; seldom "a COLOUR NOUN", "a small NOUN", "a NOUN wearing a crown" or "a
NOUN next to a ball".
* Nouns: {nouns}.
* Colours: {colours}.
* Scenes: {scenes}.

The identifiers {identifiers} are one token each and in no caption.

## Measured
{quality}

{by_eye}

## How it was made
`dvc repro base/dvc.yaml`, or the modules of `base/` one after the other; values in `base/params.yaml`.
* Pictures: an icon, turned, mirrored and scaled, on a colour, a scene (an icon too) or white; composed as needed.
* Autoencoder: {vae_parameters:.2f} M parameters, L1 of values and edges, {vae_rows:,} pictures in {vae_minutes:.0f}
  minutes.
* Text encoder: first taught to name the noun, the context and the words of a caption, then frozen.
* UNet: with the text encoder {parameters:.1f} M parameters, v-prediction, 10 % empty captions, averaged weights;
  {rows:,} pictures in {minutes:.0f} minutes on two CPU cores that other work shared, at 32 px and at 64 px.{history}

## Licences and attribution
The weights are published under the Apache License 2.0. They were trained on drawings from these icon sets, taken from
the npm packages of the Iconify project; the drawings keep their licences:

| set | drawings by | licence |
|---|---|---|
{sets}

Twemoji: copyright Twitter, Inc and other contributors, graphics licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Emoji One: emoji icons provided free by Emoji One, licensed under
CC BY 4.0 (the same address).
The drawings were changed: rendered, scaled, turned, tinted and put together.
Kept out of all training: {held_out} (the demo subjects in `data/subjects`, and what looks nearly the same).
"""


HISTORY = """
  The first {rows_before:,} of them went to an earlier version of 34 nouns with another text encoder, whose UNet and
  autoencoder this one began with (`--start`)."""
BY_EYE = (
    "backgrounds and scenes are right; dogs, cats, foxes, teddy bears, clocks and apples are recognisable everywhere,\n"
    "backpacks and teapots on plain colours and mostly in scenes, sneakers and rockets by their colours and now and\n"
    "then by their shape. Accessories are seldom drawn, fine parts are soft, and in busy scenes large plain things\n"
    "melt into the background. The loss was still falling at the end."
)
"""One paragraph on the contact sheet, by someone who looked at it: to be written anew for each published model."""


def contact_sheet(values: Recipe, pipeline: StableDiffusionPipeline) -> Image.Image:
    """Draw a row for each noun and a column for each context."""
    nouns = [noun for noun in NOUNS if noun in values.nouns]
    contexts = [context for context in CONTEXTS if not context or context in {*values.colours, *values.scenes}]
    prompts = [f"a photo of {compose.article(n)} {compose.phrase(values, c)}".strip() for n in nouns for c in contexts]
    images = quality.draw(pipeline, prompts, list(range(len(prompts))))
    sheet = Image.new("RGB", (LABEL + TILE * len(contexts), 14 + TILE * len(nouns)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, context in enumerate(contexts):
        pen.text((LABEL + column * TILE + 2, 1), context or "(nothing)", fill="black")
    for k, image in enumerate(images):
        row, column = divmod(k, len(contexts))
        sheet.paste(image, (LABEL + column * TILE, 14 + row * TILE))
        if column == 0:
            pen.text((2, 14 + row * TILE + TILE // 2 - 6), nouns[row], fill="black")
    return sheet


ROWS = {
    "model": "this model",
    "random weights": "a pipeline with random weights",
    "composed": "composed pictures through its autoencoder",
}
"""What each row of the table is; the last is the ceiling."""
MEASURED = """The share of {on_colours} prompts on colours and {in_scenes} in scenes, {seeds} seeds each, in which the
right answer wins; {steps} steps, guidance {guidance_scale:g}. Prompts are chosen by a seed, all nouns equally likely
(`base/quality.py`). Two judges: the scorer (`data/base/scorer`, on features of EfficientNet-Lite0), and a CNN trained
from nothing (`base/judge.py`), right on fresh composed pictures in {fresh[noun]:.2f} (noun, of all {nouns}),
{fresh[colour]:.2f} (colour) and {fresh[scene]:.2f} (scene).

| pictures | judge | noun, 1 of {candidates} | colour, 1 of {colours} | scene, 1 of {scenes} |
|---|---|---|---|---|
{table}
| wanted | both | {bars[noun]:.2f} | {bars[colour]:.2f} | {bars[scene]:.2f} |

{verdicts}

Nouns right in less than 60 % of their pictures, mean of both judges: {weak}."""


def quality_text(path: Path) -> str:
    """Put the measured numbers into a table and say which bars are reached."""
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    table = [
        f"| {ROWS[name]} | {who} | {right['noun']:.2f} | {right['colour']:.2f} | {right['scene']:.2f} |"
        for name, judges in found["rows"].items()
        for who, right in judges.items()
    ]
    by_noun = sorted(found["by_noun"].items(), key=lambda item: item[1])
    weak = [f"{noun} ({share:.0%})" for noun, share in by_noun if share < 0.6]
    return MEASURED.format(
        fresh=found["judge_on_fresh_composed"],
        table="\n".join(table),
        bars=quality.BARS,
        verdicts="\n".join(bars_text(found["rows"]["model"])),
        weak=", ".join(weak) or "none",
        **found,
    )


def bars_text(rows: dict[str, dict[str, float]]) -> list[str]:
    """Say which bars both judges see reached, and who misses which."""
    lines = []
    for kind, bar in quality.BARS.items():
        missed = [f"{who} {right[kind]:.2f}" for who, right in rows.items() if right[kind] < bar]
        verdict = f"not reached by {', '.join(missed)}" if missed else "reached by both judges"
        lines.append(f"* {kind}, bar {bar:.2f}: {verdict}.")
    return lines


def card(values: Recipe, folder: Path) -> str:
    """Write the model card from the recipe, the training and the measurements."""
    training = json.loads((folder / denoiser.TRAINING).read_text(encoding="utf-8"))
    sets = "\n".join(
        f"| {icons.SCOPE}/{name} {p.version} | {p.attribution} | {p.licence} |" for name, p in values.packages.items()
    )
    return CARD.format(
        size_mb=sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6,
        resolution=values.resolution,
        sheet=SHEET,
        path=folder.as_posix(),
        steps=quality.STEPS,
        guidance=quality.GUIDANCE,
        nouns=", ".join(values.nouns),
        colours=", ".join(values.colours),
        scenes=", ".join(values.scenes),
        identifiers=", ".join(f"`{word}`" for word in recipe.IDENTIFIERS),
        quality=quality_text(folder / quality.FILE),
        by_eye=f"By eye: {BY_EYE}" if BY_EYE else "",
        sets=sets,
        history=HISTORY.format(**training) if training.get("rows_before") else "",
        held_out=", ".join(f"`{name}`" for name in values.held_out),
        batch=values.denoiser.phases[-1].batch_size,
        **training,
    )


def main() -> None:
    """Draw the sheet and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sheet", type=Path, help="draw the sheet there and leave the card")
    parser.add_argument("--text", action="store_true", help="write the card, keep the sheet")
    arguments = parser.parse_args()
    values = recipe.load()
    if arguments.text:
        (recipe.MODEL / "README.md").write_text(card(values, recipe.MODEL), encoding="utf-8")
        return
    sheet = contact_sheet(values, quality.open_model())
    if arguments.sheet is not None:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(arguments.sheet)
        return
    sheet.save(recipe.MODEL / SHEET, optimize=True)
    (recipe.MODEL / "README.md").write_text(card(values, recipe.MODEL), encoding="utf-8")


if __name__ == "__main__":
    main()
