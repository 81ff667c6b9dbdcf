"""An encoder and a head as one module that the stock Trainer trains.

B batch, C classes, D feature width, H height, W width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import ModelOutput

from mllm_cl.model.encoder import Encoder
from mllm_cl.model.heads import Head


@dataclass
class ClassifierOutput(ModelOutput):
    """Loss, logits (B, C), and the features (B, D) that the head answered."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class Classifier(nn.Module):
    """logits = head(encoder(pixel_values)); with labels, the cross entropy over all seen classes.

    `local` leaves the old classes out of the softmax: every label is then one of the newest, that
    is `head.old` or above. With `features` the encoder is not asked.
    """

    # The Trainer then says how many samples the whole step has, over processes and micro-batches,
    # and the loss is their mean however they are cut up.
    accepts_loss_kwargs = True

    def __init__(self, encoder: Encoder, head: Head, *, local: bool = False) -> None:
        super().__init__()
        if head.width != encoder.width:
            raise ValueError(
                f"the head takes features of width {head.width}, but the encoder gives "
                f"{encoder.width}"
            )
        self.encoder, self.head, self.local = encoder, head, local

    def train(self, mode: bool = True) -> "Classifier":
        """The mode of training, but for batch norms of the encoder: their running statistics are
        part of its weights, which move by what a method trains alone.
        """
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        only_features: bool = False,
    ) -> ClassifierOutput:
        """What it answers to pictures (B, 3, H, W), or to features (B, D).

        With `only_features` the head, which may know no class yet, is not asked.
        """
        if (pixel_values is None) == (features is None):
            raise ValueError("a classifier takes either pixel_values or features")
        features_BD = self.encoder(pixel_values) if features is None else features
        if only_features:
            return ClassifierOutput(features=features_BD)
        logits_BC, loss = self.head(features_BD), None
        if labels is not None:
            first = self.head.old if self.local else 0
            loss = cross_entropy(logits_BC, labels, num_items_in_batch, first=first)
        return ClassifierOutput(loss=loss, logits=logits_BC, features=features_BD)

    @property
    def config(self):
        """The backbone's, for whoever asks a model of transformers."""
        return self.encoder.backbone.config

    @property
    def _no_split_modules(self) -> list[str]:
        # What accelerate's FSDP policy asks: the classes that become units of their own. A CLIP
        # vision tower alone names the text tower's, too, and accelerate fails where one is missing.
        backbone = self.encoder.backbone
        there = {type(module).__name__ for module in backbone.modules()}
        return sorted(there & set(backbone._no_split_modules or ()))

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What newer Trainers call."""
        self.encoder.backbone.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs,
            every_n_layers=every_n_layers,
            offload=offload,
        )

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """What older Trainers call."""
        self.encoder.backbone.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs,
            every_n_layers=every_n_layers,
            offload=offload,
        )


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
