"""The text side of a batch: a training knows few prompts, so each is tokenised once, and encoded no more than needed.

B rows, L tokens.
"""

from collections.abc import Sequence

import torch

from dreambooth.families import Text, encode_text, take
from dreambooth.models import Model
from dreambooth.sampling import tokenize

AT_ONCE = 16  # prompts that are encoded together: all layers of SDXL's encoders are kept of each of them


class TextSource:
    """The prompts of a training, encoded once if their encoders are frozen.

    Args:
        model: whose encoders and tokenizers read them.
        prompts: all that will be asked for; the same one may stand several times.
        trained: whether the encoders, or a word of theirs, will change.
    """

    def __init__(self, model: Model, prompts: Sequence[str], trained: bool) -> None:
        self.family = model.family
        self.prompts = list(dict.fromkeys(prompts))
        self.input_ids = tokenize(model, self.prompts)
        self.text: Text | None = None
        if not trained:
            self.text = _encode_frozen(model, self.input_ids)

    def encode(self, prompts: Sequence[str], encoders: Sequence[torch.nn.Module]) -> Text:
        """Return the text of B rows: each prompt of the batch goes through the encoders once, not once a row."""
        rows = [self.prompts.index(prompt) for prompt in prompts]
        if self.text is not None:
            return self.text.rows(rows)
        used = sorted(set(rows))
        text = encode_text(self.family, encoders, [take(input_ids, used) for input_ids in self.input_ids])
        return text.rows([used.index(row) for row in rows])


@torch.no_grad()
def _encode_frozen(model: Model, input_ids: Sequence[torch.Tensor]) -> Text:
    """Encode N prompts, (N, L) of each encoder, a few at a time."""
    encoders = list(model.encoders.values())
    parts = zip(*(torch.split(ids, AT_ONCE) for ids in input_ids), strict=True)
    return Text.joined([encode_text(model.family, encoders, part) for part in parts])
