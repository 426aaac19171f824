"""Runs of the command line that the tests of this folder look at, one after another in one process.

    python runs.py FOLDER

FOLDER gets ``rows.jsonl``, and a folder for each run; what a run prints stands behind a line ``== NAME STATUS``
on the standard output.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import yaml

from lora_ms.cli.main import main, run_mindformer
from lora_ms.commands import convert, preprocess

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "reference"
SEQ = 14
STEPS = 20
CONFIG = {
    "runner_config": {"epochs": 1, "batch_size": 2},
    "optimizer": {"type": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
    "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 2e-2, "warmup_ratio": 0.1},
    "train_dataset": {
        "packing": False,
        "length_buckets": 1,
        "drop_remainder": True,
        "data_loader": {"shuffle": False, "dataset_dir": "rows.jsonl"},
    },
    "eval_dataset": {"data_loader": {"dataset_dir": "rows.jsonl"}},
    "runner_wrapper": {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True},
    "callbacks": [
        {"type": "MFLossMonitor"},
        {"type": "CheckpointMonitor", "prefix": "x", "save_checkpoint_steps": 10, "integrated_save": False},
    ],
    "model": {"model_config": {"seq_length": SEQ}},
}
MINDFORMERS = ("--backend", "mindformers")
OURS = (*MINDFORMERS, "--pet_config.lora_impl", "lora_ms")
SHORT = ("--max_steps", "4")
CONCAT = ("--model.model_config.qkv_concat", "True", "--pet_config.target_modules", ".*w_qkv|.*w_gate_hidden|.*wo")
GROUPS = (
    *("--pet_config.layer_groups", "[{layers: 0, lora_rank: 8}, {layers: 1, lora_rank: 2}]"),
    *("--pet_config.init_lora_weights", "pissa", "--pet_config.use_rslora", "True"),
)
LLAMA2 = {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "intermediate_size": 96}
# the published file on a tiny model: sizes from the command line alone
PUBLISHED = (
    *("--config", str(HERE / "lora_llama2_7b.yaml"), "--train_dataset_dir", "rows.jsonl"),
    *("--load_checkpoint", str(REFERENCE / "models" / "llama2"), "--auto_trans_ckpt", "False"),
    *("--use_parallel", "False", "--run_mode", "finetune", *SHORT, f"--model.model_config.seq_length={SEQ}"),
    *(f"--model.model_config.{key}={value}" for key, value in LLAMA2.items()),
)


def adapter_flags(folder: Path) -> tuple[str, ...]:
    """Start from the adapter in ``folder``, which the configuration must describe."""
    c = json.loads((folder / "adapter_config.json").read_text())
    values = {"lora_rank": c["r"], "lora_alpha": c["lora_alpha"], "use_dora": c["use_dora"], "lora_dropout": 0.0}
    values["target_modules"] = json.dumps(c["target_modules"])
    flags = (f"--pet_config.{key}={value}" for key, value in values.items())
    return ("--load_adapter", str(folder), *flags)


def runs() -> dict[str, tuple[str, ...]]:
    """Flags by run; those that begin with native are what the others are held against."""
    qwen2, llama3 = (("--load_checkpoint", str(REFERENCE / "models" / name)) for name in ("qwen2", "llama3"))
    start = {
        "qwen2": (*qwen2, *adapter_flags(REFERENCE / "adapters" / "qwen2")),
        "llama3": (*llama3, *adapter_flags(REFERENCE / "adapters" / "llama3")),
        "dora": (*qwen2, *adapter_flags(REFERENCE / "variants" / "qwen2_dora")),
    }
    return {
        "native_qwen2": (*start["qwen2"], "--do_eval", "True"),
        "native_llama3": start["llama3"],
        "native_dora": (*start["dora"], *SHORT),
        "native_bare": (*qwen2, "--pet_config.target_modules", "all-linear", *SHORT),
        "mindpet_qwen2": (*start["qwen2"], *MINDFORMERS, "--do_eval", "True", "--options", "eval_step_interval=20"),
        "mindpet_llama3": (*start["llama3"], *MINDFORMERS),
        "ours_qwen2": (*start["qwen2"], *OURS),
        "ours_dora": (*start["dora"], *OURS, *SHORT),
        "ours_groups": (*llama3, *OURS, *GROUPS, *SHORT, "--do_eval", "True"),
        "mindpet_concat": (*qwen2, *MINDFORMERS, *CONCAT, *SHORT, "--do_eval", "True"),
        "ours_concat": (*qwen2, *OURS, *CONCAT, *SHORT, "--do_eval", "True"),
    }


def mindformers_sizes() -> tuple[str, ...]:
    """Of the qwen2 model, as a YAML without a Hugging Face folder has to give them."""
    hf = json.loads((REFERENCE / "models" / "qwen2" / "config.json").read_text())
    rope = hf.get("rope_parameters") or hf
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}
    same = ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "tie_word_embeddings")
    given = {key: hf[key] for key in same} | {key: hf[name] for key, name in names.items()}
    given |= {"theta": rope["rope_theta"], "qkv_has_bias": True}
    return tuple(f"--model.model_config.{key}={value}" for key, value in given.items())


def write_rows(file: Path) -> None:
    """Forty rows of 7 to 13 tokens, of which the first few are not learnt."""
    rng = np.random.default_rng(0)
    with open(file, "w") as stream:
        for _ in range(2 * STEPS):
            ids = rng.integers(4, 96, rng.integers(7, SEQ)).tolist()
            silent = int(rng.integers(1, 4))
            row = {"input_ids": ids, "labels": [-100] * silent + ids[silent:]}
            stream.write(json.dumps(row) + "\n")


def tell(name: str, command, arguments: tuple[str, ...]) -> None:
    """Runs ``command``, and prints its status and output."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = command([*arguments, "--output_dir", name])
    print(f"== {name} {status}\n{said.getvalue()}", flush=True)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    write_rows(Path("rows.jsonl"))
    Path("run.yaml").write_text(yaml.safe_dump(CONFIG))
    adapters = {"qwen2": "adapters/qwen2", "llama3": "adapters/llama3", "dora": "variants/qwen2_dora"}
    starts = {f"native_{name}": str(REFERENCE / path) for name, path in adapters.items()}
    Path("starts.json").write_text(json.dumps(starts))
    for name, flags in runs().items():
        pet = () if "--load_adapter" in flags else ("--pet_config.lora_rank=4", "--pet_config.lora_alpha=8")
        tell(name, main, ("finetune", "--config", "run.yaml", *pet, "--pet_config.lora_dropout=0.0", *flags))
    rows = ("--load_checkpoint", str(REFERENCE / "models" / "qwen2"), "--train_dataset_dir", "rows.jsonl")
    tell("preprocess", main, ("preprocess", *rows, "--seq_length", str(SEQ), "--layout", "mindformers"))
    own = ("--train_dataset.data_loader.dataset_dir", "preprocess/train-00000.mindrecord")
    tell("own_file", main, ("finetune", "--config", "run.yaml", *runs()["mindpet_qwen2"], *own))
    preprocess.ROWS_PER_FILE = 12
    tell("preprocess_parts", main, ("preprocess", *rows, "--seq_length", str(SEQ), "--layout", "mindformers"))
    folder = (*own[:1], "preprocess_parts")
    tell("own_folder", main, ("finetune", "--config", "run.yaml", *runs()["mindpet_qwen2"], *folder))
    convert.run(rows[1], "own.safetensors")
    started = ("finetune", "--config", "run.yaml", *runs()["mindpet_qwen2"], *mindformers_sizes())
    tell("own_weights", main, (*started, "--load_checkpoint", "own.safetensors", *SHORT))
    two = ("--epochs", "2", "--lr_schedule.total_steps", str(2 * STEPS))
    tell("whole", main, ("finetune", "--config", "run.yaml", *runs()["native_qwen2"], *two))
    tell("first", main, (*started, *two, "--max_steps", str(STEPS)))
    again = (*started, *two, "--load_checkpoint", "first/checkpoint", "--resume_training", "True")
    tell("second", main, again)
    tell("second_of_folder", main, (*again, *folder))
    tell("published_native", run_mindformer, PUBLISHED)
    tell("published_mindformers", run_mindformer, (*PUBLISHED, *MINDFORMERS))
    evaluated = ("eval", "--load_checkpoint", str(REFERENCE / "models" / "qwen2"), "--seq_length", str(SEQ))
    evaluated = (*evaluated, "--eval_dataset_dir", "rows.jsonl", "--load_adapter")
    for name in ("mindpet_qwen2", "mindpet_concat", "ours_concat", "ours_dora"):
        tell(f"eval_{name}", main, (*evaluated, f"{name}/adapter"))
    llama3 = tuple(str(REFERENCE / "models" / "llama3") if "qwen2" in word else word for word in evaluated)
    tell("eval_ours_groups", main, (*llama3, "ours_groups/adapter"))
    tell("eval_mindformers", main, (*evaluated, "mindpet_qwen2/adapter", *MINDFORMERS))
