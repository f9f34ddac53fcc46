"""Pictures of a model while it is trained: always the same prompts and noise, so that only the weights change."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from dreambooth import rng
from dreambooth.errors import first_line, is_out_of_memory
from dreambooth.models import Model
from dreambooth.params import Train
from dreambooth.sampling import SamplerSettings, draw

SCHEDULER, NUM_INFERENCE_STEPS = "dpmsolver++", 20  # Lu et al. 2022


@dataclass(frozen=True)
class Previews:
    """What is drawn every `preview_steps` steps, and who gets it.

    Attributes:
        prompts: N sentences.
        resolution: side of the pictures in pixels.
        keep: receives the number of steps done, and N pictures.
        say: is told when the memory did not suffice.
    """

    prompts: Sequence[str]
    resolution: int
    keep: Callable[[int, list[Image.Image]], object]
    say: Callable[[str], object]

    def draw(self, model: Model, step: int, settings: Train) -> None:
        """Draw them with the weights in memory; a lack of memory costs the previews, never the training."""
        sampler = SamplerSettings(
            SCHEDULER,
            NUM_INFERENCE_STEPS,
            settings.preview_guidance_scale,
            self.resolution,
            batch_size=1,  # beside the optimizer there may be no room for all of them
        )
        seeds = [rng.derive_seed(settings.seed, "preview", number) for number in range(len(self.prompts))]
        trained = [module for module in (model.unet, *model.encoders.values()) if module.training]
        for module in trained:
            module.eval()
        try:
            images = draw(model, self.prompts, seeds, sampler)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.say(f"warning: no previews after step {step}: {first_line(error)}")
        else:
            self.keep(step, images)
        finally:
            for module in trained:
                module.train()
