"""Golden values of the loss's further terms and of their gradients, by torch's autograd in float64: forgetting.npz.

python tests/reference/make_forgetting.py, with torch
"""

from pathlib import Path

import numpy as np
import torch


def main() -> None:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    found: dict[str, torch.Tensor] = {}

    # EWC, lambda 1000 and weight 0.2, and O-LoRA's overlap, weight 0.5
    start, fisher = draw(4, 6), draw(4, 6) ** 2
    earlier = draw(3, 6)
    w = (start + 0.1 * draw(4, 6)).requires_grad_()
    ewc = 0.2 * 1000 * (fisher * (w - start) ** 2).sum()
    orthogonal = 0.5 * ((w @ earlier.T) ** 2).sum()
    found |= {"start": start, "fisher": fisher, "earlier": earlier, "w": w}
    found |= {"ewc": ewc, "d_ewc": torch.autograd.grad(ewc, w)[0]}
    found |= {"orthogonal": orthogonal, "d_orthogonal": torch.autograd.grad(orthogonal, w)[0]}

    # The hybrid loss of a micro-batch: two domain rows of 3 and 2 label tokens, two general rows of 2 and 4.
    # cross-entropy + 0.1 contrastive + 0.3 KL(start || now) over the general rows
    counts, general = [3, 2, 2, 4], [False, True, False, True]
    hidden, head = draw(11, 5).requires_grad_(), draw(9, 5).requires_grad_()
    before, first_head = draw(11, 5), draw(9, 5)
    targets = torch.randint(0, 9, (11,))
    slots = torch.split(torch.arange(11), counts)
    entropy = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    means = torch.stack([hidden[s].mean(0) for s in slots])
    mask = torch.tensor(general)
    cos = torch.nn.functional.cosine_similarity(means[~mask][:, None], means[mask][None], dim=-1)
    contrastive = torch.nn.functional.cross_entropy(cos / 0.07, torch.arange(2))
    held = torch.cat([s for s, of_general in zip(slots, general, strict=True) if of_general])
    now = torch.log_softmax(hidden[held] @ head.T, -1)
    then = torch.log_softmax(before[held] @ first_head.T, -1)
    divergence = torch.nn.functional.kl_div(now, then, reduction="batchmean", log_target=True)
    hybrid = entropy + 0.1 * contrastive + 0.3 * divergence
    d_hidden, d_head = torch.autograd.grad(hybrid, (hidden, head))
    found |= {"hidden": hidden, "head": head, "before": before, "first_head": first_head, "targets": targets}
    found |= {
        "counts": torch.tensor(counts),
        "general": mask,
        "cross_entropy": entropy,
        "contrastive": 0.1 * contrastive,
    }
    found |= {"kl_anchor": 0.3 * divergence, "d_hidden": d_hidden, "d_head": d_head}
    arrays = {name: value.detach().numpy() for name, value in found.items()}
    np.savez_compressed(Path(__file__).parent / "forgetting.npz", **arrays)


if __name__ == "__main__":
    main()
