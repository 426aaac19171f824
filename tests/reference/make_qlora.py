"""Write nf4/, trace_nf4*.npz and loftq_qwen2.npz: NF4 by bitsandbytes, in transformers and PEFT, in float32.

bitsandbytes 0.50.2 decodes on processors with AVX-512 a wrong absmax where a row is no multiple of 64 numbers. Here its
own default formula, in torch, takes the place of that function: the same numbers on every processor. So it does, in
the traces, for the bytes of double quantisation, which its function for the CPU rounds by a table of 65,536 places.
"""

import hashlib
import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_4bit
from common import REFERENCE_DIR, load_reference_model, ragged_mask, save_json, save_npz
from make_trace import ADAM, ALPHA, MICRO_BATCHES, RANK, WEIGHT_DECAY, make_rows, named_weights, summed_loss
from make_trace import Recipe as TraceRecipe
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

STEPS = 12
RATE, LARGEST_NORM = 5e-3, 0.5
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
FAMILIES = {"llama3": 71, "qwen2": 72, "qwen3": 73}  # and the seed of their rows
KINDS = {"nf4": False, "nf4_double": True}
STORED = "qwen2"  # the model of nf4/


def _dequantize(a, absmax, blocksize, quant_type, shape, dtype):
    code = bnb.functional.get_4bit_type(quant_type, device="cpu")
    return _dequantize_4bit_compute(a.view(torch.uint8).reshape(-1), absmax, code, blocksize, shape, dtype)


torch._dynamo.config.disable = True
_library = torch.library.Library("bitsandbytes", "IMPL")
_library.impl("dequantize_4bit", _dequantize, "CPU", allow_override=True)


def _quantize(a, code, blocksize):
    """The rule of the default backend, which registers it under a name that cannot be imported."""
    flat, absmax = a.reshape(-1).float(), []
    scaled = []
    for block in flat.split(blocksize):
        largest = block.abs().max()
        absmax.append(largest)
        full = block.numel() == blocksize
        scaled.append((block * (1.0 / largest.clamp(min=1e-38)) if full else block / largest).clamp(-1, 1))
    found = torch.bucketize(torch.cat(scaled), (code[:-1] + code[1:]) / 2).to(torch.uint8)
    return found.reshape(a.shape), torch.stack(absmax)


def quantised(name: str, double: bool, dtype: torch.dtype | str = torch.float32):
    """The reference model in NF4, as transformers loads it."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        Path("models") / name,
        dtype=dtype,
        attn_implementation="eager",
        quantization_config=settings,
        device_map={"": "cpu"},
    ).eval()


def numbers_of(module: torch.nn.Module) -> np.ndarray:
    """The float32 numbers of a quantised layer."""
    state = module.weight.quant_state
    state.dtype = torch.float32
    return dequantize_4bit(module.weight.data, state).numpy()


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def write_folders() -> None:
    """nf4/plain and nf4/double as transformers saves them, and the digests of the float32 numbers of each weight."""
    for kind, double in (("plain", False), ("double", True)):
        target = REFERENCE_DIR / "nf4" / kind
        shutil.rmtree(target, ignore_errors=True)
        model = quantised(STORED, double, "auto")
        model.save_pretrained(target)
        (target / "generation_config.json").unlink(missing_ok=True)
        digests = {
            f"{name}.weight": hashlib.sha256(numbers_of(module).tobytes()).hexdigest()
            for name, module in linears(model).items()
        }
        save_json(REFERENCE_DIR / "nf4" / f"{kind}.json", digests)
        print(kind, len(digests), "weights", json.loads((target / "config.json").read_text())["quantization_config"])


def adapted(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with an adapter: first factor fixed by the seed, second zero."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    rng = np.random.default_rng(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                values = 0.01 * rng.standard_normal(tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model.train()


def logits_of(model: torch.nn.Module, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[rows, longest, vocabulary], zero on padding."""
    mask = torch.from_numpy(ragged_mask(lengths, ids.shape[1], "right"))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids), attention_mask=mask).logits
    return (logits * mask[:, :, None]).numpy()


def run(name: str, double: bool, seed: int) -> dict[str, np.ndarray]:
    """Train and return the arrays of the npz."""
    recipe = TraceRecipe(name, STEPS, RATE, None, LARGEST_NORM, 0.01, seed)
    arrays = make_rows(np.random.default_rng(seed), STEPS)
    model = adapted(quantised(name, double), seed)
    arrays |= {f"initial/{key}": value for key, value in named_weights(recipe, model).items() if "lora_A" in key}
    first = (arrays["input_ids"][0, 0], arrays["lengths"][0, 0])
    arrays["first_logits"] = logits_of(model, *first)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=WEIGHT_DECAY, **ADAM)
    per_step = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        count, loss = arrays["label_tokens"][step].sum(), 0.0
        for micro in range(MICRO_BATCHES):
            part = summed_loss(model, *(arrays[key][step, micro] for key in ("input_ids", "labels", "lengths"))) / count
            part.backward()
            loss += part.item()
        per_step["loss"].append(loss)
        per_step["grad_norm"].append(torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM).item())
        optimizer.step()
    arrays |= {key: np.array(values) for key, values in per_step.items()}
    whole = logits_of(load_reference_model(name), *first)
    moved = abs(arrays["first_logits"] - whole).max()
    print(f"{name} double {double}: loss {per_step['loss'][0]:.4f} -> {per_step['loss'][-1]:.4f}", end=", ")
    print(f"norms {np.round(per_step['grad_norm'], 3)}, NF4 moves the logits by {moved:.2f} of {abs(whole).max():.2f}")
    arrays["max_grad_norm"] = np.array(LARGEST_NORM)
    return arrays | {f"final/{key}": value for key, value in named_weights(recipe, model).items()}


def write_loftq() -> None:
    """B A at LoftQ's start, by module, and what is left of the quantisation's error."""
    model, whole, arrays = quantised("qwen2", False), load_reference_model("qwen2"), {}
    for name, module in linears(model).items():
        error = whole.get_submodule(name).weight.data.numpy() - numbers_of(module)
        # as PEFT's replace_lora_weights_loftq, which needs a GPU: B is L, A is R
        factors = _low_rank_decomposition(torch.from_numpy(error), reduced_rank=RANK)
        arrays[name] = (factors["L"] @ factors["R"]).numpy()
        before, after = np.linalg.norm(error), np.linalg.norm(error - arrays[name])
        print(f"loftq {name}: error {before:.4f} -> {after:.4f}")
    keep = [name for name in arrays if name.endswith(("q_proj", "down_proj"))]
    save_npz(REFERENCE_DIR / "loftq_qwen2.npz", {name: arrays[name] for name in keep})


def main() -> None:
    load_reference_model(STORED)  # goes to the folder that the models' paths begin in
    write_folders()
    _library.impl("quantize_blockwise", _quantize, "CPU", allow_override=True)
    for name, seed in FAMILIES.items():
        for kind, double in KINDS.items():
            save_npz(REFERENCE_DIR / f"trace_{kind}_{name}.npz", run(name, double, seed))
    write_loftq()


if __name__ == "__main__":
    main()
