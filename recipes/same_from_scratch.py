"""SAME (arXiv:2602.01990) in one flat file of torch and transformers, to be read from the top.

    python recipes/same_from_scratch.py mllm_cl/assets/tiny-llava   # or the folder of any LLaVA

A frozen vision-language model gets LoRA experts beside some linear layers and learns two tasks in
turn: first with nothing held back, then with SAME, which protects three things. (Of the tiny LLaVA
the loss on the first task, 0.00 when learnt, ends at 4.64 without SAME and at 0.00 with it.)

  routers  move along inputs of the task at hand, and not at all along inputs of earlier tasks;
  experts  move the slower the more earlier tasks used a direction, A and B both;
  idle     experts, which this task hardly uses and earlier ones relied upon, rest.

All of it is one matrix per weight, which an update passes on its way INTO the forward pass. To
project gradients would not hold: AdamW divides them by their size and decays weights besides.
B batch, T tokens, D inputs and O outputs of a layer, E experts, R LoRA rank of one expert.
"""

import sys

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor


# --- 1. A weight that moves in coordinates, and experts made of such weights ---------------------
class Moving(nn.Module):
    """W + active (delta G): W stays put, delta trains, the guard G (D, D) says where it may go."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("guard", torch.eye(weight.shape[-1]))
        self.register_buffer("active", torch.ones(len(weight), *[1] * (weight.dim() - 1)))
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self) -> Tensor:
        # To rest is to be multiplied by 0 here: a zero gradient would not stop Adam's momentum.
        return self.weight + self.active * (self.delta @ self.guard)

    @torch.no_grad()
    def settle(self) -> None:
        """The task is over: its update joins W, in fp32 (bf16 would round much of it away)."""
        self.weight.copy_(self())
        self.delta.zero_()


class Experts(nn.Module):
    """y = L x + 2 sum_i w_i B_i A_i x, w = softmax(router x) for every token by itself."""

    def __init__(self, linear: nn.Linear, num_experts: int = 4, rank: int = 8) -> None:
        super().__init__()
        self.linear, wide = linear, linear.in_features
        self.A = Moving(0.01 * torch.randn(num_experts, rank, wide))
        self.B = Moving(torch.zeros(num_experts, linear.out_features, rank))  # so y = L x at first
        self.router = Moving((torch.rand(num_experts, wide) * 2 - 1) * wide**-0.5)

    def route(self, x: Tensor) -> Tensor:
        return (x @ self.router().T).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.einsum("...d,erd->...er", x, self.A()) * self.route(x).unsqueeze(-1)
        return self.linear(x) + 2 * torch.einsum("...er,eor->...o", low, self.B())


def add_experts(model: nn.Module, ends: tuple[str, ...]) -> dict[str, Experts]:
    """Freeze the model and put experts beside the linear layers whose names end like `ends`."""
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if name.endswith(ends)}
    for name, linear in linears.items():
        model.set_submodule(name, Experts(linear))
    return {name: model.get_submodule(name) for name in linears}


# --- 2. What a layer meets: sums, so that those of several tasks add up to that of all -----------
@torch.no_grad()
def measure(model: nn.Module, layers: dict[str, Experts], batches: list[dict]) -> dict:
    """Over the real tokens, by layer: the sums of x x^T, of the shares w and of w ||x||^2."""
    sums = {each: dict.fromkeys(("xx", "count", "use", "energy"), 0.0) for each in layers.values()}

    def watch(layer: Experts, args: tuple, output: Tensor) -> None:
        mine, x_TD = sums[layer], args[0][real_BT]
        w_TE = layer.route(x_TD)
        mine["xx"] += x_TD.T @ x_TD
        mine["count"] += len(x_TD)
        mine["use"] += w_TE.sum(0)
        mine["energy"] += x_TD.square().sum(-1) @ w_TE

    handles = [layer.register_forward_hook(watch) for layer in sums]
    for batch in batches:
        real_BT = batch["attention_mask"].bool()  # padding is no input
        model(**batch)
    for handle in handles:
        handle.remove()
    return sums


# --- 3. The guards, from the second moment C = sum x x^T / count ---------------------------------
def projector(c_DD: Tensor, energy: float = 0.99) -> Tensor:
    """U U^T over the fewest directions that hold `energy` of the trace of C."""
    value_D, vector_DD = torch.linalg.eigh(c_DD.double())  # smallest first
    beyond = int((value_D.cumsum(-1) <= (1 - energy) * value_D.sum()).sum())
    return vector_DD[:, beyond:] @ vector_DD[:, beyond:].T


def slowing(c_DD: Tensor, damping: float = 0.001) -> Tensor:
    """The root of m (C + m I)^-1 (delta's gradient meets it too), m relative to C's eigenvalues."""
    value_D, vector_DD = torch.linalg.eigh(c_DD.double())
    m = damping * value_D.mean(-1, keepdim=True)
    return (vector_DD * (m / (value_D.clamp_min(0) + m)).sqrt().unsqueeze(-2)) @ vector_DD.mT


def protect(layer: Experts, now: dict, past: dict | None) -> None:
    """Set the guards of one layer, and which of its experts learn in this task."""
    confined_DD = projector(now["xx"] / now["count"])
    layer.router.guard = confined_DD.float()
    if past is None:
        return
    c_DD = past["xx"].double() / past["count"]
    open_DD = torch.eye(len(c_DD)) - projector(c_DD)
    layer.router.guard = (open_DD @ confined_DD @ open_DD).float()
    layer.A.guard = slowing(c_DD).float()
    a_ERD = layer.A().detach().double()
    layer.B.guard = slowing(a_ERD @ c_DD @ a_ERD.mT).float()  # of B's own input, which is A x
    use_E, need_E = ((v - v.min()) / (v.max() - v.min()) for v in (now["use"], past["energy"]))
    best_E = (use_E - need_E).argsort(descending=True, stable=True)
    active_E = use_E - need_E >= 0.1
    active_E[best_E[:2]] = True  # alone an expert would weigh 1, and its router learn nothing
    layer.A.active = layer.B.active = active_E.float()[:, None, None]


# --- 4. One task after another -------------------------------------------------------------------
def train(model: nn.Module, batches: list[dict], lr: float = 5e-3) -> list[float]:
    """One pass of stock AdamW over the deltas; the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def learn(model, layers, batches: list[dict], past: dict | None) -> tuple[list[float], dict]:
    """One task with SAME: its losses, and the sums that will guard the next one."""
    for layer, now in measure(model, layers, batches).items():
        protect(layer, now, past and past[layer])
    losses = train(model, batches)
    met = measure(model, layers, batches)  # again: what lies below a layer has moved meanwhile
    for layer, sums in met.items():
        layer.A.settle(), layer.B.settle(), layer.router.settle()
        met[layer] = {key: sums[key] + (past[layer][key] if past else 0) for key in sums}
    return losses, met


# --- 5. Two tasks to try it on: what colours stand for -------------------------------------------
TASKS = {
    "digit": {"red": "1", "green": "2", "blue": "3"},
    "letter": {"yellow": "A", "purple": "C", "orange": "E"},
}


def batch_of(processor, task: str) -> dict[str, Tensor]:
    texts, pictures, ends = [], [], []
    parts = [{"type": "image"}, {"type": "text", "text": f"Which {task} is this?"}]
    chat = [{"role": "user", "content": parts}]
    for colour, answer in TASKS[task].items():
        ends.append(answer + processor.tokenizer.eos_token)
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True) + ends[-1])
        pictures.append(Image.new("RGB", (64, 64), colour))
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    batch = dict(processor(text=texts, images=pictures, **how))
    batch["labels"] = batch["input_ids"].clone()
    for row, end in enumerate(ends):  # the loss is on the answers, which end the rows
        ids = processor.tokenizer(end, add_special_tokens=False)["input_ids"]
        batch["labels"][row, : -len(ids)] = -100
    return batch


def main(folder: str) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    tasks = {task: [batch_of(processor, task)] * 60 for task in TASKS}
    for name in ("free", "SAME"):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        layers, past = add_experts(model, ("gate_proj", "up_proj", "down_proj")), None
        for task, batches in tasks.items():
            if name == "SAME":
                _, past = learn(model, layers, batches, past)
            else:
                train(model, batches)
            losses = [f"{each} {model(**tasks[each][0]).loss:.2f}" for each in tasks]
            print(f"{name} after {task}: loss on", *losses)


if __name__ == "__main__":
    main(sys.argv[1])
