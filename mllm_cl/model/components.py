"""CODA-Prompt's prefix: a weighted sum of all components, by what a picture asks of each.

B batch, M components, D width, L tokens, Q width of a query, S keys and values.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_cl import engine
from mllm_cl.model.moe_lora import seeded
from mllm_cl.model.penalty import penalise
from mllm_cl.model.prompts import Choice, Prefix


class Components(Prefix):
    """Keys and values Σ_m w_m P_m with w_m = cos(q ⊙ A_m, K_m): A says what of a query q a
    component looks at, K what it looks for.

    They owe `strength` · Σ over P, A and K of the mean of (U Uᵀ − I)², U having a row for each.
    """

    def __init__(
        self, pool: Iterable[Tensor], choice: Choice, *, width: int, strength: float
    ) -> None:
        super().__init__(pool, choice)
        kinds = [[part.new_zeros(len(part), width) for part in self.pool] for _ in range(2)]
        self.looks, self.keys = (nn.ParameterList(one) for one in kinds)  # of (M, Q) each
        self.strength = strength
        if strength:
            penalise(self, self._skewness)

    def families(self) -> Iterator[nn.ParameterList]:
        """What each component has of its own, task by task: P, A and K."""
        yield from (self.pool, self.looks, self.keys)

    def weight_BKP(self) -> Tensor:
        """The weights of all components, (B, 1, M)."""
        looks_MQ, keys_MQ = (torch.cat(list(one)).float() for one in (self.looks, self.keys))
        with torch.autocast(looks_MQ.device.type, enabled=False):
            asked_BMQ = self.choice.query_BQ[:, None] * looks_MQ
            return functional.cosine_similarity(asked_BMQ, keys_MQ, dim=-1, eps=1e-12)[:, None]

    def _skewness(self) -> Tensor:
        return self.strength * sum(map(_from_orthogonal, self.families()))


def _from_orthogonal(parts: nn.ParameterList) -> Tensor:
    rows_MX = torch.cat([part.flatten(1) for part in parts]).float()
    unit_MM = torch.eye(len(rows_MX), device=rows_MX.device)
    return (rows_MX @ rows_MX.T - unit_MM).square().mean()


@torch.no_grad()
def begin(components: Components, *, seed: int, name: str) -> None:
    """Make the newest of each family orthogonal to all that came before, and of length 1.
    Collective.

    ValueError where there are more of them than there are directions.
    """
    for place, parts in enumerate(components.families()):
        before = [engine.full(part).flatten(1).double().cpu() for part in parts]
        size = engine.shape(parts[-1])
        old_MX = torch.cat(before[:-1]) if len(before) > 1 else before[-1][:0]
        if len(old_MX) + size[0] > old_MX.shape[1]:
            raise ValueError(
                f"found {len(old_MX) + size[0]} components of {old_MX.shape[1]} numbers each, but "
                "no more are orthogonal to each other than there are numbers: take fewer for a task"
            )
        drawn_MX = torch.randn(
            size[0], old_MX.shape[1], generator=seeded(seed, f"{name}.{place}.{len(parts)}")
        )
        engine.write(parts[-1], beside(old_MX, drawn_MX.double()).float().view(size))


def beside(old_MX: Tensor, drawn_MX: Tensor) -> Tensor:
    """The drawn rows by Gram–Schmidt: orthogonal to the old ones and to each other, of length 1."""
    rows = list(torch.linalg.qr(old_MX.T).Q.T)
    number = len(rows)
    for row_X in drawn_MX:
        for _ in range(2):  # the second time takes off what rounding left
            for other_X in rows:
                row_X = row_X - (row_X @ other_X) * other_X
        rows.append(row_X / row_X.norm())
    return torch.stack(rows[number:])
