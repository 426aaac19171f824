"""Write logits_<name>.npz: logits and greedy tokens of every reference model, from transformers in float32."""

import numpy as np
import torch
import transformers
from common import (
    MODEL_NAMES,
    PAD_ID,
    REFERENCE_DIR,
    asked,
    load_reference_model,
    position_ids_from,
    ragged_mask,
    save_npz,
    text_ids,
)

LENGTHS = np.array([12, 7, 4])
PROMPT_LENGTHS = np.array([6, 3])
NEW_TOKENS = 24
# A smaller gap between the two best scores could fall either way in another engine's rounding.
SMALLEST_MARGIN = 1e-3
SEEDS = {"llama2": 29, "llama3": 26, "qwen2": 48, "qwen3": 24, "deepseek_r1_qwen": 40, "smollm3": 21}


@torch.no_grad()
def masked_logits(model: transformers.PreTrainedModel, ids: np.ndarray, side: str) -> dict[str, np.ndarray]:
    """Logits of ragged rows. Those of padding have no meaning and are saved as zero."""
    mask = ragged_mask(LENGTHS, ids.shape[1], side)
    rows = np.full_like(ids, PAD_ID)
    for row, length in enumerate(LENGTHS):
        rows[row, mask[row] == 1] = ids[row, :length]
    position_ids = position_ids_from(mask)
    logits = model(
        input_ids=torch.from_numpy(rows),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(position_ids),
    ).logits.numpy()
    return {
        f"{side}_input_ids": rows,
        f"{side}_attention_mask": mask,
        f"{side}_position_ids": position_ids,
        f"{side}_logits": logits * mask[:, :, None],
    }


def greedy(
    model: transformers.PreTrainedModel, ids: np.ndarray, mask: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and new tokens [rows, prompt + new], and the margin best minus second best score [rows, new]."""
    output = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            repetition_penalty=penalty,
            pad_token_id=PAD_ID,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    best = torch.stack(output.scores, dim=1).topk(2, dim=-1).values
    return output.sequences.numpy(), (best[..., 0] - best[..., 1]).numpy()


def check_greedy(name: str, key: str, config_eos: set[int], tokens: np.ndarray, margin: np.ndarray) -> None:
    """The run must be full length, decided, and free of eos, so that an engine that stops at eos agrees too."""
    new = tokens[:, -NEW_TOKENS:]
    if margin.shape != (len(tokens), NEW_TOKENS) or margin.min() < SMALLEST_MARGIN or config_eos & set(new.ravel()):
        raise SystemExit(f"{name} {key}: margins {margin.shape} down to {margin.min():.1e}, tokens {new}: other seed")
    print(f"{name} {key}: smallest margin {margin.min():.1e}, {len(np.unique(new))} different tokens")


def greedy_arrays(
    name: str, model: transformers.PreTrainedModel, eos: set[int], prompts: np.ndarray
) -> dict[str, np.ndarray]:
    """Greedy runs with and without repetition penalty, from whole prompts and from left-padded ones."""
    left_mask = ragged_mask(PROMPT_LENGTHS, prompts.shape[1], "left")
    batches = {
        "prompt": (prompts, np.ones_like(prompts)),
        "left_prompt": (np.where(left_mask == 1, prompts, PAD_ID), left_mask),
    }
    arrays = {}
    for prefix, (ids, mask) in batches.items():
        arrays[f"{prefix}_input_ids"], arrays[f"{prefix}_attention_mask"] = ids, mask
        for suffix, penalty in (("greedy", 1.0), ("penalty", 1.2)):
            key = f"{prefix}_{suffix}"
            arrays[key], arrays[f"{key}_margin"] = greedy(model, ids, mask, penalty)
            check_greedy(name, key, eos, arrays[key], arrays[f"{key}_margin"])
    return arrays


def main() -> None:
    for name in filter(asked, MODEL_NAMES):
        model = load_reference_model(name)
        eos = model.config.eos_token_id
        eos = set(eos) if isinstance(eos, list) else {eos}
        # generate() falls back on both; None lets it run to max_new_tokens.
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        rng = np.random.default_rng(SEEDS[name])
        ids = text_ids(rng, (3, 12))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        arrays = {"input_ids": ids, "logits": logits}
        arrays |= masked_logits(model, ids, "right") | masked_logits(model, ids, "left")
        arrays |= greedy_arrays(name, model, eos, text_ids(rng, (2, 6)))
        save_npz(REFERENCE_DIR / f"logits_{name}.npz", arrays)
        print(f"{name}: logits std {logits.std():.2f}, largest {abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
