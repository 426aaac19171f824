"""Write preferences.npz: twelve steps of DPO, ORPO, SimPO and KTO, from torch, transformers and PEFT in float32.

A step is two micro-batches of two rows, each of two answers: the chosen and the rejected one, or, of KTO, the answer
that is judged and another to the same question. Its loss is the mean over its rows. The comparisons of log-likelihoods
are TRL's code where TRL has them as functions (ORPO's odds, SimPO), and else its formulas, written down here (DPO, KTO;
ORPO's cross-entropy is the chosen answer's mean, as in the paper: TRL's also learns the question).
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from common import FIRST_TEXT_ID, PAD_ID, REFERENCE_DIR, VOCAB_SIZE, load_reference_model, ragged_mask, save_npz
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

STEPS, MICRO_BATCHES, ROWS, LONGEST = 12, 2, 2, 16
IGNORED = -100
KEYS = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.2},
    "orpo": {"beta": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "kto": {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
}
CPU = SimpleNamespace(device=torch.device("cpu"))


def make_rows(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows [steps, micro, rows, 2, longest]: a random question, and an answer that follows from it beside another."""
    shape = (STEPS, MICRO_BATCHES, ROWS)
    input_ids = np.full((*shape, 2, LONGEST), PAD_ID)
    labels = np.full((*shape, 2, LONGEST), IGNORED)
    lengths = np.zeros((*shape, 2), int)
    for place in np.ndindex(shape):
        question = rng.integers(FIRST_TEXT_ID, VOCAB_SIZE, size=rng.integers(2, 7))
        for answer in range(2):
            length = rng.integers(len(question) + 2, LONGEST + 1)
            row = list(question)
            while len(row) < length:
                step = (row[-1] * 5 + 3) if answer == 0 else (row[-1] * 7 + 11)
                row.append(step % (VOCAB_SIZE - FIRST_TEXT_ID) + FIRST_TEXT_ID)
            input_ids[place][answer, :length] = row
            labels[place][answer, len(question) : length] = row[len(question) :]
            lengths[place][answer] = length
    liked = rng.random(shape) < 0.5
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths, "liked": liked}


def trainable_model() -> torch.nn.Module:
    """LoRA whose first factor is fixed by a seed, and whose second one is not zero: its start is no base model."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_reference_model("qwen2"), config)
    rng = np.random.default_rng(77)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                spread = 0.05 if "lora_A" in name else 0.02
                values = spread * rng.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.train()


def log_likelihoods(model, ids, labels, lengths) -> tuple[torch.Tensor, torch.Tensor]:
    """Of answers [rows, 2]: summed over their tokens, and the number of these."""
    ids, labels, lengths = ids.reshape(-1, LONGEST), labels.reshape(-1, LONGEST), lengths.reshape(-1)
    mask = torch.from_numpy(ragged_mask(lengths, LONGEST, "right"))
    logits = model(input_ids=torch.from_numpy(ids), attention_mask=mask).logits[:, :-1]
    targets = torch.from_numpy(labels)[:, 1:]
    learnt = targets != IGNORED
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * learnt
    return found.sum(1).reshape(-1, 2), learnt.sum(1).reshape(-1, 2)


def dpo(now, before, counts, liked, beta, label_smoothing, sft_weight):
    rewards = beta * (now - before)
    margin = rewards[:, 0] - rewards[:, 1]
    losses = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return losses - sft_weight * now[:, 0] / counts[:, 0], rewards


def orpo(now, before, counts, liked, beta):
    means = now / counts
    ratios, *rewards = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=beta, accelerator=CPU), *means.T)[:3]
    return -means[:, 0] - ratios, torch.stack(rewards, 1)


def simpo(now, before, counts, liked, beta, gamma):
    trainer = SimpleNamespace(
        beta=beta, simpo_gamma=gamma, alpha=0.0, label_smoothing=0.0, loss_type="simpo", accelerator=CPU
    )
    losses, *rewards = CPOTrainer.cpo_loss(trainer, *(now / counts).T)
    return losses, torch.stack(rewards, 1)


def kto(now, before, counts, liked, beta, desirable_weight, undesirable_weight):
    ratios = now - before
    kl = ratios[:, 1].mean().clamp(min=0).detach()
    chosen = desirable_weight * (1 - torch.sigmoid(beta * (ratios[:, 0] - kl)))
    rejected = undesirable_weight * (1 - torch.sigmoid(beta * (kl - ratios[:, 0])))
    return torch.where(liked, chosen, rejected), beta * ratios


def shown(name: str, rewards: torch.Tensor, liked: torch.Tensor) -> list[float]:
    """Means of a step: rewards of chosen and of rejected answers; of KTO those are the rows that the label says."""
    if name == "kto":
        parts = [rewards[:, 0][liked], rewards[:, 0][~liked]]
        return [part.mean().item() if len(part) else 0.0 for part in parts]
    return rewards.mean(0).tolist()


def run(name: str, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    formula = {"dpo": dpo, "orpo": orpo, "simpo": simpo, "kto": kto}[name]
    model = trainable_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.1)
    per_step = {"loss": [], "rewards": [], "grad_norm": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        total, all_rewards = 0.0, []
        for micro in range(MICRO_BATCHES):
            batch = [rows[key][step, micro] for key in ("input_ids", "labels", "lengths")]
            with torch.no_grad(), model.disable_adapter():
                before, _ = log_likelihoods(model, *batch)
            now, counts = log_likelihoods(model, *batch)
            liked = torch.from_numpy(rows["liked"][step, micro])
            losses, rewards = formula(now, before, counts, liked, **KEYS[name])
            part = losses.sum() / (MICRO_BATCHES * ROWS)
            part.backward()
            total += part.item()
            all_rewards.append(rewards.detach())
        liked = torch.from_numpy(rows["liked"][step].reshape(-1))
        per_step["loss"].append(total)
        per_step["rewards"].append(shown(name, torch.cat(all_rewards), liked))
        per_step["grad_norm"].append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        optimizer.step()
    final = get_peft_model_state_dict(model)
    arrays = {f"{name}/{key}": np.array(values) for key, values in per_step.items()}
    print(name, np.round(arrays[f"{name}/loss"], 3))
    return arrays | {f"{name}/final/{key}": v.numpy() for key, v in final.items() if "layers.1" in key}


def main() -> None:
    rows = make_rows(np.random.default_rng(51))
    initial = {
        f"initial/{key}": value.numpy().copy() for key, value in get_peft_model_state_dict(trainable_model()).items()
    }
    arrays = {**rows, **initial}
    for name in KEYS:
        arrays |= run(name, rows)
    save_npz(REFERENCE_DIR / "preferences.npz", arrays)


if __name__ == "__main__":
    main()
