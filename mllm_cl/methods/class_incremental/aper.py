"""APER: adapt a pre-trained model to the first stage, then compare class means of both models.

Source: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models",
arXiv:2303.07338, section 4.2 (there called ADAM), and its released code.
"""

from dataclasses import dataclass

from mllm_cl.learner import FirstStageLearner
from mllm_cl.memory import Memory
from mllm_cl.model.classifier import Classifier
from mllm_cl.model.heads import Prototype
from mllm_cl.model.vision import show_both


@dataclass(frozen=True, kw_only=True)
class APER(FirstStageLearner):
    """The feature is f'(x) = [f(x); f_adapted(x)], the weight of class c the mean of f' over its
    training images, the answer argmax_c cos(f'(x), w_c).

    The branches are joined as they come, so that the one of larger norm weighs more.
    """

    def forecast_bytes(self, model: Classifier, num_tasks: int) -> int:
        """Sums and counts of both branches, if no later stage has more classes than the first."""
        return 8 * model.head.number * num_tasks * (2 * model.encoder.width + 1)

    def settle(self, model: Classifier, memory: Memory) -> None:
        """Both branches, and the prototypes of the past."""
        known = memory.under(self.name)
        show_both(model.encoder)
        model.head = Prototype(model.encoder.width, len(known.get("count", ())))
        if known:
            model.head.restore(known["sum"], known["count"])
