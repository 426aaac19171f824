"""Write trace_forgetting_qwen2.npz: twelve steps with five further terms of the loss, from torch and PEFT.

A step is one micro-batch of six ragged rows, of which every second is general. Its loss is

    cross-entropy + 0.2 EWC + 0.05 L2 + 0.05 orthogonality + 0.1 contrast + 0.3 KL(start || now)

as means over label tokens, pairs, and general label tokens. The gradient is clipped by its global norm; AdamW steps.
"""

import numpy as np
import torch
import torch.nn.functional as F
from common import REFERENCE_DIR, ragged_mask, save_npz
from make_trace import ADAM, IGNORED, WEIGHT_DECAY, Recipe, make_rows, named_weights, trainable_model

RECIPE = Recipe("qwen2", 12, 5e-3, None, 1.0, 0.2, 44)
LAMBDA, TEMPERATURE = 2.0, 0.07
WEIGHTS = {"ewc": 0.2, "l2_anchor": 0.05, "orthogonal": 0.05, "contrastive": 0.1, "kl_anchor": 0.3}


def spans(hidden: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Of each row the hidden states [label tokens, h] from which its label tokens are predicted."""
    return [row[:-1][own[1:] != IGNORED] for row, own in zip(hidden, labels, strict=True)]


def run(dtype: torch.dtype) -> dict[str, np.ndarray]:
    arrays = make_rows(np.random.default_rng(RECIPE.seed), RECIPE.steps)
    for key in ("input_ids", "labels", "lengths"):
        arrays[key] = arrays[key].reshape(RECIPE.steps, 6, *arrays[key].shape[3:])
    arrays["label_tokens"] = arrays["label_tokens"].sum(1)
    model = trainable_model(RECIPE, dtype)
    arrays |= {f"initial/{name}": value for name, value in named_weights(RECIPE, model).items()}
    trained = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    rng = np.random.default_rng(RECIPE.seed + 200)
    fisher = {name: (0.1 * rng.standard_normal(tuple(p.shape)) ** 2).astype(np.float32) for name, p in trained.items()}
    earlier = {
        name: (0.1 * rng.standard_normal((3, p.shape[1]))).astype(np.float32)
        for name, p in trained.items()
        if "lora_A" in name
    }
    arrays |= {f"fisher/{name}": value for name, value in fisher.items()}
    arrays |= {f"earlier/{name}": value for name, value in earlier.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=RECIPE.learning_rate, weight_decay=WEIGHT_DECAY, **ADAM)
    decoder, head = model.base_model.model.model, model.base_model.model.lm_head
    logged: dict[str, list[float]] = {name: [] for name in ("cross_entropy", *WEIGHTS, "grad_norm")}
    for step in range(RECIPE.steps):
        optimizer.zero_grad()
        ids, labels = (torch.from_numpy(arrays[key][step]) for key in ("input_ids", "labels"))
        mask = torch.from_numpy(ragged_mask(arrays["lengths"][step], ids.shape[1], "right"))
        hidden = spans(decoder(input_ids=ids, attention_mask=mask).last_hidden_state, labels)
        with torch.no_grad(), model.disable_adapter():  # a fresh adapter changes nothing: the model of the start
            before = spans(decoder(input_ids=ids, attention_mask=mask).last_hidden_state, labels)
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        parts = {"cross_entropy": F.cross_entropy(head(torch.cat(hidden)), targets)}
        parts["ewc"] = LAMBDA * sum(
            (torch.from_numpy(fisher[name]).to(dtype) * (p - start[name]) ** 2).sum() for name, p in trained.items()
        )
        parts["l2_anchor"] = sum(((p - start[name]) ** 2).sum() for name, p in trained.items())
        parts["orthogonal"] = sum(
            ((trained[name] @ torch.from_numpy(a).to(dtype).T) ** 2).sum() for name, a in earlier.items()
        )
        means = torch.stack([states.mean(0) for states in hidden])
        cos = F.cosine_similarity(means[0::2][:, None], means[1::2][None], dim=-1)
        parts["contrastive"] = F.cross_entropy(cos / TEMPERATURE, torch.arange(3))
        now, then = (torch.log_softmax(head(torch.cat(states[1::2])), -1) for states in (hidden, before))
        parts["kl_anchor"] = F.kl_div(now, then, reduction="batchmean", log_target=True)
        weighted = {name: WEIGHTS.get(name, 1.0) * value for name, value in parts.items()}
        sum(weighted.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), RECIPE.max_grad_norm)
        optimizer.step()
        for name, value in {**weighted, "grad_norm": norm}.items():
            logged[name].append(value.item())
    arrays |= {name: np.array(values) for name, values in logged.items()}
    return arrays | {f"final/{name}": value for name, value in named_weights(RECIPE, model).items()}


def main() -> None:
    arrays, double = run(torch.float32), run(torch.float64)
    for name in ("cross_entropy", *WEIGHTS, "grad_norm"):
        gap = abs(arrays[name] - double[name]).max()
        print(f"{name}: {np.round(arrays[name], 4)}, float64 differs by {gap:.1e}")
    finals = [key for key in arrays if key.startswith("final/")]
    print(f"final weights: float64 differs by {max(abs(arrays[key] - double[key]).max() for key in finals):.1e}")
    save_npz(REFERENCE_DIR / "trace_forgetting_qwen2.npz", arrays)


if __name__ == "__main__":
    main()
