"""Heads that grow with the classes: rows of old classes are kept to the bit.

B batch, C classes, D feature width, P prompts of a class.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.moe_lora import seeded


class Head(nn.Module):
    """What answers features (B, width) with logits (B, number), and `grow`s by classes.

    `old` counts the classes from before the last growth: the newest are those from there on.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.number, self.old = width, 0, 0

    def grow(self, number: int) -> None:
        """Make place for `number` more classes. ValueError if there are less than one."""
        if number < 1:
            raise ValueError(f"a head grows by one class or more, not by {number}")
        self.old, self.number = self.number, self.number + number

    def hold(self, earlier: int, newest: int) -> None:
        """Grow by the classes of earlier tasks and then by the newest, as far as there are any."""
        for number in filter(None, (earlier, newest)):
            self.grow(number)

    def fading(self) -> list[nn.Parameter]:
        """What an optimizer is given though its gradient is zero, so that weight decay moves it."""
        return []

    def forward(self, features_BD: Tensor) -> Tensor:
        """The logits (B, C)."""
        return self.precisely(self.logits, features_BD)

    def precisely(
        self, rule: Callable[..., Tensor | None], features_BD: Tensor, *others: Tensor
    ) -> Tensor | None:
        """A rule of the head, in at least fp32: classes that bf16 cannot tell apart would tie."""
        wide = torch.promote_types(features_BD.dtype, torch.float32)
        with torch.autocast(features_BD.device.type, enabled=False):
            return rule(features_BD.to(wide), *others)

    def logits(self, features_BD: Tensor) -> Tensor:
        """The head's own rule, in the dtype of the features."""
        raise NotImplementedError

    def losses(
        self, features_BD: Tensor, labels_B: Tensor, views_BD: Tensor | None = None
    ) -> Tensor | None:
        """What each sample (B,) adds to the loss, where that is not the cross entropy of its
        logits; `views_BD` are other views of the same pictures, where a method asks for any.
        """
        return None

    def by_name(self, features_BD: Tensor, prompts_CPD: Tensor) -> Tensor:
        """cos(φ, t_c), where images and the prompts of classes, seen or not, lie in one space."""
        return cosines(features_BD, ensemble(prompts_CPD).to(features_BD))


class Linear(Head):
    """logits = W φ + b, with W as He has it for a linear output and b at zero.

    A new row is drawn from the seed and its own place alone, so that it depends neither on how many
    tasks brought the classes before it nor on the process.
    """

    def __init__(self, width: int, number: int = 0, *, seed: int = 0) -> None:
        super().__init__(width)
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(0, width))
        self.bias = nn.Parameter(torch.empty(0))
        if number:
            self.grow(number)

    def grow(self, number: int) -> None:
        """Rows from U(-√(3/width), √(3/width)), zero biases."""
        super().grow(number)
        self.weight = _longer(self.weight, _drawn(self, (3 / self.width) ** 0.5))
        self.bias = _longer(self.bias, torch.zeros(number))

    def logits(self, features_BD: Tensor) -> Tensor:
        """W φ + b."""
        dtype = features_BD.dtype
        return functional.linear(features_BD, self.weight.to(dtype), self.bias.to(dtype))


class NearestMean(Linear):
    """Linear while it trains, and answers with the class whose mean is nearest to the feature:
    logits = −‖φ / ‖φ‖ − mean_c‖².

    `mean_CD` is what a method makes of the features it has seen, of length 1 each.
    """

    def __init__(self, width: int, number: int = 0, *, seed: int = 0) -> None:
        super().__init__(width, number, seed=seed)
        self.mean_CD: Tensor | None = None

    def logits(self, features_BD: Tensor) -> Tensor:
        """W φ + b in training; later −‖φ / ‖φ‖ − mean_c‖²."""
        if self.training:
            return super().logits(features_BD)
        assert self.mean_CD is not None, "there are no means before the task has ended"
        unit_BD, mean_CD = functional.normalize(features_BD, dim=-1), self.mean_CD.to(features_BD)
        return 2 * unit_BD @ mean_CD.T - mean_CD.square().sum(-1) - 1


class Cosine(Head):
    """logits = sigma cos(φ, w_c), with w from U(-1/√width, 1/√width).

    At sigma 1 logits lie between -1 and 1, and the gradient of cross entropy is small: that is how
    the papers have it. Sigma is learnt unless `learns_sigma` is False.
    """

    def __init__(
        self,
        width: int,
        number: int = 0,
        *,
        sigma: float = 1.0,
        learns_sigma: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(width)
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(0, width))
        self.sigma = nn.Parameter(torch.tensor([sigma])) if learns_sigma else sigma
        if number:
            self.grow(number)

    def grow(self, number: int) -> None:
        """Rows from U(-1/√width, 1/√width); sigma stays what it became."""
        super().grow(number)
        self.weight = _longer(self.weight, _drawn(self, self.width**-0.5))

    def logits(self, features_BD: Tensor) -> Tensor:
        """sigma cos(φ, w_c)."""
        return self.sigma * cosines(features_BD, self.weight.to(features_BD.dtype))


class Prototype(Head):
    """logits = cos(φ, mean of the class's raw features): nothing is trained.

    Sums and counts are float64, so means do not depend on the size or order of batches, nor on how
    samples are shared out. They are neither parameters nor buffers: no engine casts, broadcasts or
    shards them. `sum_CD` and `count_C` are what a task has to remember.
    """

    def __init__(self, width: int, number: int = 0) -> None:
        super().__init__(width)
        self.sum_CD = torch.zeros(0, width, dtype=torch.float64)
        self.count_C = torch.zeros(0, dtype=torch.float64)
        self._added_CD, self._added_C = self.sum_CD, self.count_C
        if number:
            self.grow(number)

    def grow(self, number: int) -> None:
        """Places for classes of which no sample was seen yet."""
        super().grow(number)
        rows_CD, rows_C = self.sum_CD.new_zeros(number, self.width), self.count_C.new_zeros(number)
        self.sum_CD = torch.cat([self.sum_CD, rows_CD])
        self.count_C = torch.cat([self.count_C, rows_C])
        self._added_CD = torch.cat([self._added_CD, rows_CD])
        self._added_C = torch.cat([self._added_C, rows_C])

    def learn(self, number: int, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Grow by `number` classes, count this process's share of their samples (`features` and
        `labels`), and return what has to be remembered of all classes. Collective.
        """
        self.grow(number)
        for batch in batches:
            self.add(batch["features"], batch["labels"])
        self.share()
        return {"sum": self.sum_CD, "count": self.count_C}

    def add(self, features_BD: Tensor, labels_B: Tensor) -> None:
        """Count samples of this process; `share` makes them part of the means."""
        sum_CD, count_C = class_sums(features_BD, labels_B, self.number)
        self._added_CD, self._added_C = self._added_CD + sum_CD, self._added_C + count_C

    def share(self) -> None:
        """Join what all processes have added since the last time. Collective."""
        self.sum_CD = self.sum_CD + engine.sum_over_ranks(self._added_CD)
        self.count_C = self.count_C + engine.sum_over_ranks(self._added_C)
        self._added_CD, self._added_C = (
            torch.zeros_like(self.sum_CD),
            torch.zeros_like(self.count_C),
        )

    def restore(self, sum_CD: Tensor, count_C: Tensor) -> None:
        """Put remembered sums in the place of the first classes' own. ValueError if they differ
        in width, or are of more classes than there are.
        """
        known = len(count_C)
        if known > self.number or sum_CD.shape != (known, self.width):
            raise ValueError(
                f"sums of shape {tuple(sum_CD.shape)} and {known} counts do not fit a head of "
                f"{self.number} classes and width {self.width}"
            )
        self.sum_CD[:known], self.count_C[:known] = sum_CD, count_C

    @property
    def weight_CD(self) -> Tensor:
        """The class means, float64. ValueError for a class of which there is no sample."""
        empty = (self.count_C == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"there is no training image of {len(empty)} of {self.number} classes (the first "
                f"is number {empty[0]}): raise train_size, or leave these classes out"
            )
        return self.sum_CD / self.count_C[:, None]

    def logits(self, features_BD: Tensor) -> Tensor:
        """cos(φ, mean of the class)."""
        assert not self._added_C.any(), "every process calls share() before the head answers"
        return cosines(features_BD, self.weight_CD.to(features_BD))


class Named(Head):
    """logits = scale · cos(φ, t_c), t_c being the text feature of a class's name: nothing trains.

    `text_CD` comes from the names themselves whenever it is needed, so no task has to remember it.
    """

    def __init__(self, width: int, *, scale: float) -> None:
        super().__init__(width)
        self.scale = scale
        self.text_CD = torch.zeros(0, width)

    def learn(self, text_CD: Tensor) -> None:
        """The features of all classes so far, old and new."""
        self.grow(len(text_CD) - self.number)
        self.text_CD = text_CD

    def logits(self, features_BD: Tensor) -> Tensor:
        """scale · cos(φ, t_c)."""
        return self.scale * cosines(features_BD, self.text_CD.to(features_BD))


@torch.no_grad()
def class_sums(features_ND: Tensor, labels_N: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The sum (C, D) and count (C,) of the features of every class: float64, on the CPU.

    They add over batches and processes. On the CPU, since a GPU adds in another order every time.
    """
    labels_N = labels_N.cpu()
    sum_CD = torch.zeros(number, features_ND.shape[-1], dtype=torch.float64)
    sum_CD.index_add_(0, labels_N, features_ND.double().cpu())
    return sum_CD, torch.bincount(labels_N, minlength=number).double()


def ensemble(prompts_CPD: Tensor) -> Tensor:
    """One unit feature (C, D) for all prompts of each class: the mean of their directions.

    Source: the released code of PROOF (arXiv:2305.19270), as CLIP's own zero-shot evaluation.
    """
    mean_CD = functional.normalize(prompts_CPD, dim=-1).mean(dim=1)
    return functional.normalize(mean_CD, dim=-1)


def cosines(features_BD: Tensor, weight_CD: Tensor) -> Tensor:
    """cos(φ_b, w_c) of every feature and row: (B, C); a row of zeros has cosine 0."""
    unit_BD = functional.normalize(features_BD, dim=-1)
    return functional.linear(unit_BD, functional.normalize(weight_CD, dim=-1))


def _drawn(head: Linear | Cosine, bound: float) -> Tensor:
    """The newest rows of a head, each from the seed and its own place."""
    return torch.stack(
        [
            torch.empty(head.width).uniform_(-bound, bound, generator=seeded(head.seed, f"{row}"))
            for row in range(head.old, head.number)
        ]
    )


def _longer(parameter: nn.Parameter, new: Tensor) -> nn.Parameter:
    """A parameter of the old rows and the new, in the place of the old one."""
    rows = torch.cat([parameter.detach(), new.to(parameter)])
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)
