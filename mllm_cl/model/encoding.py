"""What every model around an encoder has in common, whatever it answers."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mllm_cl.model.encoder import Encoder


class Encoding(nn.Module):
    """A module around an encoder, as the stock Trainer and engines take it.

    Asked for `only_features` of pictures or of texts it gives the encoder's, as `features`.
    `picture_bytes` is what a picture takes that it is shown, one byte for each number.
    """

    # The Trainer then says how many samples the whole step has, over processes and micro-batches,
    # and the loss is their mean however they are cut up.
    accepts_loss_kwargs = True

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.picture_bytes = encoder, 0

    def train(self, mode: bool = True) -> "Encoding":
        """The mode of training, but for batch norms of the encoder: their running statistics are
        part of its weights, which move by what a method trains alone.
        """
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

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
