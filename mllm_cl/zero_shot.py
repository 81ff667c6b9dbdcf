"""What a model answers by the names of all classes, also of those that it has not learnt yet.

C classes, D feature width, N images, P prompts of a class.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mllm_cl.model.classifier import Classifier
from mllm_cl.model.watch import evaluating

Score = float | None


def zero_shot(
    model: Classifier, names: Sequence[str], known: int, sets: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Score]:
    """The accuracy on images of the first `known` classes, `seen`, on those of the others,
    `unseen`, and the harmonic mean; None where there is no image. Collective.

    The answer is the class of all `names` that is nearest in the space that images and texts share,
    as the model makes it now. `sets` are features (N, D) of images and the places (N,) of their
    classes. Source: PROOF, arXiv:2305.19270, and its released code.
    """
    prompts_CPD = model.prompts(names)
    right, total = [0, 0], [0, 0]
    for features_ND, label_N in sets:
        right_N = _nearest(model, features_ND, prompts_CPD) == label_N
        for group, mine_N in enumerate((label_N < known, label_N >= known)):
            right[group] += int(right_N[mine_N].sum())
            total[group] += int(mine_N.sum())
    seen, unseen = (r / t if t else None for r, t in zip(right, total, strict=True))
    return {"seen": seen, "unseen": unseen, "harmonic_mean": harmonic_mean(seen, unseen)}


def alignment(model: Classifier, features_ND: Tensor, text_ND: Tensor) -> float:
    """The LAION score: the mean cosine of images and their own captions, as the model makes both
    now. Images and texts drift apart where it falls. Collective.

    Source: PROOF, arXiv:2305.19270, on pairs of LAION-400M; how many is not told.
    """
    device, parts = next(model.parameters()).device, []
    with evaluating(model):
        for image_BD, text_BD in zip(features_ND.split(256), text_ND.split(256), strict=True):
            given = {"features": image_BD.to(device), "prompts": text_BD[:, None].to(device)}
            parts.append(model(**given).logits.diagonal().double().cpu())
    return torch.cat(parts).mean().item()


def harmonic_mean(seen: Score, unseen: Score) -> Score:
    """2 s u / (s + u), 0 where both are 0."""
    if seen is None or unseen is None:
        return None
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def _nearest(model: Classifier, features_ND: Tensor, prompts_CPD: Tensor) -> Tensor:
    device = next(model.parameters()).device
    prompts_CPD = prompts_CPD.to(device)
    with evaluating(model):
        parts = [
            model(features=one_BD.to(device), prompts=prompts_CPD).logits.argmax(1).cpu()
            for one_BD in features_ND.split(1024)
        ]
    return torch.cat(parts)
