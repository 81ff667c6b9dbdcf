"""An encoder and a head as one module that the stock Trainer trains.

B batch, C classes, D feature width, H height, L text length, P prompts of a class, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import ModelOutput

from mllm_cl import engine
from mllm_cl.model.descriptions import Descriptions
from mllm_cl.model.encoder import Encoder
from mllm_cl.model.encoding import Encoding
from mllm_cl.model.heads import Head, ensemble
from mllm_cl.model.penalty import due
from mllm_cl.model.teacher import teacher_of
from mllm_cl.model.texts import TEXTS, Reader, called_by
from mllm_cl.model.watch import evaluating


@dataclass
class ClassifierOutput(ModelOutput):
    """Loss, logits (B, C), the features (B, D) that the head answered, the logits (B, C_old) that
    the teacher gives, if there is one, while the model trains, and what parts of the model owe.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None
    before: Tensor | None = None
    owed: Tensor | None = None


class Classifier(Encoding):
    """logits = head(encoder(pixel_values)); with labels, the cross entropy over all seen classes.

    `local` leaves the old classes out of the softmax: every label is then one of the newest, that
    is `head.old` or above. `criterion` may be `binary_cross_entropy` instead. With `features` the
    encoder is not asked. `reader` makes tokens of class names, where the model has a text tower,
    and `descriptions` are what somebody says of the classes.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: Head,
        *,
        local: bool = False,
        reader: Reader | None = None,
    ) -> None:
        super().__init__(encoder)
        if head.width != encoder.width:
            raise ValueError(
                f"the head takes features of width {head.width}, but the encoder gives "
                f"{encoder.width}"
            )
        self.head, self.local, self.reader = head, local, reader
        self.criterion = cross_entropy
        self.descriptions = Descriptions()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        only_features: bool = False,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        views: Tensor | None = None,
    ) -> ClassifierOutput:
        """What it answers to pictures (B, 3, H, W), or to features (B, D).

        With `only_features` the head, which may know no class yet, is not asked; nor is it for
        texts (N, L), which have features alone. With the features of `prompts` (C, P, D) the
        answer is one of their classes, known or not, by its name. `views` (B, 3, H, W) are the same
        pictures in another way, which a head may learn from beside them.
        """
        if input_ids is not None:
            # Through this door, since only here an engine gathers what it has sharded.
            return ClassifierOutput(features=self.encoder.text(input_ids, attention_mask))
        if (pixel_values is None) == (features is None):
            raise ValueError("a classifier takes either pixel_values or features")
        features_BD = self.encoder(pixel_values) if features is None else features
        if only_features:
            return ClassifierOutput(features=features_BD)
        if prompts is not None:
            logits_BC = self.head.precisely(self.head.by_name, features_BD, prompts)
            return ClassifierOutput(logits=logits_BC, features=features_BD)
        own_B = None
        if labels is not None:
            seen = () if views is None else (self.encoder(views),)
            own_B = self.head.precisely(self.head.losses, features_BD, labels, *seen)
        if own_B is not None:
            total = len(labels) if num_items_in_batch is None else num_items_in_batch
            return ClassifierOutput(loss=own_B.sum() / total, features=features_BD)
        logits_BC, loss = self.head(features_BD), None
        if labels is not None:
            first = self.head.old if self.local else 0
            loss = self.criterion(logits_BC, labels, num_items_in_batch, first=first)
        before_BC = None if pixel_values is None else self._before(pixel_values)
        # DDP has to find all that trains below what this returns, a method's own terms, too.
        return ClassifierOutput(
            loss=loss, logits=logits_BC, features=features_BD, before=before_BC, owed=due(self)
        )

    @torch.no_grad()
    def _before(self, pixel_values_BCHW: Tensor) -> Tensor | None:
        # In here, where autocast holds for the teacher, too, of which no engine knows.
        teacher = teacher_of(self)
        if teacher is None or not self.training:
            return None
        dtype = next(iter(teacher.encoder.sight.values())).dtype
        return teacher.head(teacher.encoder(pixel_values_BCHW.to(dtype)))[:, : self.head.old]

    def prompts(self, names: Sequence[str]) -> Tensor:
        """The features (C, P, D) of every prompt of some classes, as they come, in fp32 on the CPU.
        Collective.

        ValueError where the model has no text tower or no tokenizer.
        """
        if self.reader is None:
            raise ValueError(
                f"{type(self.encoder.backbone).__name__} reads no class names: choose a CLIP or "
                "SigLIP model, with its tokenizer"
            )
        return self.read(self.reader.prompts(names)).unflatten(0, (len(names), -1))

    def called(self, name: str) -> str:
        """What prompts call a class."""
        return called_by([name], self.reader.texts)[name]

    def read(self, texts: Sequence[str]) -> Tensor:
        """The features (N, D) of texts, as they come, in fp32 on the CPU. Collective."""
        device, parts = next(self.parameters()).device, []
        with evaluating(self):
            for start in range(0, len(texts), TEXTS):
                tokens = self.reader.tokens(texts[start : start + TEXTS])
                given = {key: value.to(device) for key, value in tokens.items()}
                parts.append(self(**given).features.float().cpu())
        engine.shard_again(self)
        return torch.cat(parts)

    def texts(self, names: Sequence[str]) -> Tensor:
        """One unit feature (C, D) for each class name, of all its prompts together. Collective."""
        return ensemble(self.prompts(names))


def cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    num_items: Tensor | int | None = None,
    *,
    first: int = 0,
) -> Tensor:
    """Cross entropy over the classes from `first` on, summed and divided by `num_items` (or B)."""
    # Shifted labels must not meet the label that cross entropy skips, -100 unless told otherwise.
    skipped = -logits_BC.shape[-1] - 1
    total = functional.cross_entropy(
        logits_BC[:, first:], labels_B - first, reduction="sum", ignore_index=skipped
    )
    return total / (len(labels_B) if num_items is None else num_items)


def binary_cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    num_items: Tensor | int | None = None,
    *,
    first: int = 0,
) -> Tensor:
    """The binary cross entropies of all classes from `first` on, each by its own sigmoid, summed
    and divided by `num_items` (or B). A label below `first` is none of them.
    """
    class_C = torch.arange(first, logits_BC.shape[-1], device=labels_B.device)
    target_BC = (labels_B[:, None] == class_C).to(logits_BC.dtype)
    total = functional.binary_cross_entropy_with_logits(
        logits_BC[:, first:], target_BC, reduction="sum"
    )
    return total / (len(labels_B) if num_items is None else num_items)
