"""The command line's flags, and the keys of the configuration that they set. A new flag is one more line here."""

import argparse
from typing import Any


def flag_bool(text: str) -> bool:
    """True or False, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expects True or False, got {text!r}")
    return text.lower() == "true"


def flag_int(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects a whole number, got {text!r}") from None


def flag_float(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects a number, got {text!r}") from None


def flag_path(text: str) -> str:
    """The name of a file or folder; not "", which a shell variable that is not set leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expects a path, got nothing")
    return text


def flag_targets(text: str) -> str | list[str]:
    """Modules: a list of names between commas, else all-linear or a regular expression."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    words = text.replace(",", " ").split()
    if not all(word.replace("_", "").replace(".", "").isalnum() for word in words):
        return text
    if len(words) > len(names):
        raise argparse.ArgumentTypeError(f"expects commas between names, got {text!r}: write {','.join(words)}")
    return names if len(names) > 1 or "_" in text else "".join(names) or text


def flag_processes(text: str) -> int:
    """A number of processes."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"takes no value, or a number of processes, got {text!r}")
    return int(text)


def flag_bool_or_name(text: str) -> bool | str:
    """True or False in any case, else a checkpoint's name."""
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def flag_fill(text: str) -> tuple[str, str]:
    """``NAME=text``: the name is a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expects NAME=text with a word as NAME, got {text!r}")
    return name, value


SIZES = "model.model_config"
PET = f"{SIZES}.pet_config"
DATA = "data_loader.dataset_dir"

# group -> (flag, key of the configuration, type, placeholder, help); a flag that is not given keeps the YAML's value
FLAGS: dict[str, list[tuple[str, str, Any, str, str]]] = {
    "model and data": [
        (
            "load_checkpoint",
            "load_checkpoint",
            str,
            "PATH",
            "Hugging Face folder, owner/name, or .ckpt, .safetensors",
        ),
        ("load_adapter", "load_adapter", str, "DIR", "adapter folder: to use, or to train further"),
        ("quantize", f"{SIZES}.quantization_config", str, "NAME", "the model's weights in four bits: nf4, nf4-double"),
        ("train_dataset_dir", f"train_dataset.{DATA}", str, "PATH", "training rows: file, folder, glob or owner/name"),
        ("eval_dataset_dir", f"eval_dataset.{DATA}", str, "PATH", "evaluation rows: file, folder, glob or owner/name"),
        ("hub", "hub", str, "NAME", "hub for models and data given as owner/name: hf or modelscope"),
        ("revision", "revision", str, "NAME", "branch, tag or commit of such a model"),
        ("num_samples", "train_dataset.num_samples", flag_int, "N", "read the first N rows only"),
        (
            "chat_template",
            "processor.tokenizer.chat_template",
            str,
            "NAME",
            "chatml, llama2, llama3, qwen, alpaca, vicuna, deepseek, human_assistant, or a file",
        ),
        ("output_dir", "output_dir", str, "DIR", "where results go"),
    ],
    "training": [
        ("epochs", "runner_config.epochs", flag_int, "N", "passes over the data (1)"),
        ("max_steps", "runner_config.max_steps", flag_int, "N", "optimiser steps; -1: as many as the epochs make"),
        ("batch_size", "runner_config.batch_size", flag_int, "N", "rows per device and micro-batch (1)"),
        (
            "gradient_accumulation_steps",
            "runner_config.gradient_accumulation_steps",
            flag_int,
            "N",
            "micro-batches per optimiser step",
        ),
        ("learning_rate", "lr_schedule.learning_rate", flag_float, "X", "highest learning rate (1e-4)"),
        ("lora_rank", f"{PET}.lora_rank", flag_int, "N", "rank of the adapter (16)"),
        ("lora_alpha", f"{PET}.lora_alpha", flag_float, "X", "the update is scaled by alpha / rank (16)"),
        ("lora_dropout", f"{PET}.lora_dropout", flag_float, "X", "dropout on the adapter's input (0.05)"),
        (
            "target_modules",
            f"{PET}.target_modules",
            flag_targets,
            "NAMES",
            "q_proj,v_proj or all-linear or a regular expression",
        ),
        ("seq_length", f"{SIZES}.seq_length", flag_int, "N", "longest row, in tokens (1024, or the model's own limit)"),
        (
            "resume_training",
            "resume_training",
            flag_bool_or_name,
            "True|NAME",
            "resume from the newest checkpoint, or from NAME",
        ),
        (
            "overwrite_output_dir",
            "overwrite_output_dir",
            flag_bool,
            "BOOL",
            "also delete files that no run has written",
        ),
        ("do_eval", "do_eval", flag_bool, "BOOL", "evaluate on eval_dataset while training"),
        ("eval_step_interval", "eval_step_interval", flag_int, "N", "optimiser steps between evaluations (100)"),
        ("report_to", "report_to", str, "NAME", "tensorboard, wandb, swanlab, mlflow or none"),
        ("profile", "profile", flag_bool, "BOOL", "profile the first steps: where their time goes"),
    ],
    "device and seed": [
        ("use_parallel", "use_parallel", flag_bool, "BOOL", "one process per card, started by msrun"),
        ("device_target", "context.device_target", str, "NAME", "auto, Ascend or CPU"),
        (
            "low_memory",
            "context.low_memory",
            flag_bool,
            "BOOL",
            "save memory: float16, one row at a time, recomputation",
        ),
        ("device_id", "context.device_id", flag_int, "N", "which card"),
        ("seed", "seed", flag_int, "N", "seed of initialisation, order, dropout, sampling"),
    ],
    "generation": [
        ("prompts_file", "evaluation.prompts_file", str, "FILE", "for eval: questions with the answers expected"),
        (
            "tasks",
            "evaluation.tasks",
            str,
            "NAME|FILE",
            "for eval: tasks of lm-evaluation-harness, or YAML files of such",
        ),
        ("num_fewshot", "evaluation.num_fewshot", flag_int, "N", "examples before each question of a task"),
        ("limit", "evaluation.limit", flag_int, "N", "only the first N questions of each task"),
        ("max_new_tokens", f"{SIZES}.max_new_tokens", flag_int, "N", "longest answer, in tokens"),
        ("max_length", f"{SIZES}.max_decode_length", flag_int, "N", "longest prompt and answer together"),
        ("do_sample", f"{SIZES}.do_sample", flag_bool, "BOOL", "False: always the most likely token"),
        ("temperature", f"{SIZES}.temperature", flag_float, "X", "randomness: below 1 less, above 1 more, 0 none"),
        ("top_k", f"{SIZES}.top_k", flag_int, "N", "sample among the N most likely tokens; 0: all"),
        ("top_p", f"{SIZES}.top_p", flag_float, "X", "sample among the likeliest tokens of total probability X"),
        ("repetition_penalty", f"{SIZES}.repetition_penalty", flag_float, "X", "above 1: fewer repetitions; 1: off"),
    ],
    "MindFormers compatibility": [
        ("backend", "backend", str, "NAME", "native, or mindformers: its models and trainer"),
        ("run_mode", "run_mode", str, "MODE", "finetune, train, eval or predict"),
        ("sink_mode", "runner_config.sink_mode", flag_bool, "BOOL", "feed the device several steps at a time"),
    ],
}
SEVERAL = ("tasks",)  # flags that take several values
# MindFormers' flags without effect here: accepted, and reported by RunConfig.notices()
IDLE_FLAGS: list[tuple[str, str, Any, str | None]] = [
    ("mode", "context.mode", flag_int, None),
    ("modal_type", "modal_type", str, "+"),
    ("predict_batch_size", "predict_batch_size", flag_int, None),
    ("adapter_id", "adapter_id", str, "+"),
    ("src_strategy_path_or_dir", "src_strategy_path_or_dir", str, None),
    ("auto_trans_ckpt", "auto_trans_ckpt", flag_bool, None),
    ("transform_process_num", "transform_process_num", flag_int, None),
    ("only_save_strategy", "only_save_strategy", flag_bool, None),
    ("strategy_load_checkpoint", "strategy_load_checkpoint", str, None),
    ("remote_save_url", "remote_save_url", str, None),
    ("register_path", "register_path", str, None),
    ("trust_remote_code", "trust_remote_code", flag_bool, None),
]
# other names that people type -> the flag
ALIASES = {
    "model_name_or_path": "load_checkpoint",
    "adapter_name_or_path": "load_adapter",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_seq_length": "seq_length",
    "lora_r": "lora_rank",
}
FLAG_KEYS = {row[0]: row[1] for rows in FLAGS.values() for row in rows} | {row[0]: row[1] for row in IDLE_FLAGS}
OTHER_FLAGS = tuple("config preset fill options predict_data predict_file predict_output system dry_run debug".split())
# of serve, with vLLM's names where it has them: (name, type, nargs, default, placeholder, help)
SERVE_FLAGS: list[tuple[str, Any, str | None, Any, str, str]] = [
    ("host", str, None, "127.0.0.1", "NAME", "address to listen at (127.0.0.1: this machine alone)"),
    ("port", flag_int, None, 8000, "N", "its port (8000; 0: a free one)"),
    ("served-model-name", str, "+", [], "NAME", "the model's name, or names, in requests (its folder's)"),
    ("lora-modules", str, "+", [], "NAME=DIR", "adapters, by the names that requests use"),
    ("max-model-len", flag_int, None, None, "N", "longest prompt with answer (what the model and 2 GB of cache allow)"),
    ("max-num-seqs", flag_int, None, None, "N", "requests that run at once (8)"),
    ("max-loras", flag_int, None, None, "N", "adapters at once (those named, plus 8 with --adapter-folders)"),
    ("max-lora-rank", flag_int, None, None, "N", "largest rank (of those named; 16 with --adapter-folders)"),
    ("max-waiting", flag_int, None, 64, "N", "further requests that wait; more get status 429 (64)"),
    ("max-body-bytes", flag_int, None, 1 << 20, "N", "largest request (1048576)"),
    ("request-timeout", flag_float, None, 600.0, "SECONDS", "longest time until an answer ends (600)"),
    ("read-timeout", flag_float, None, 20.0, "SECONDS", "longest time until a request has arrived (20)"),
    ("shutdown-timeout", flag_float, None, 60.0, "SECONDS", "time for running answers after SIGTERM (60)"),
    ("allowed-origins", str, "+", [], "URL", "other web pages that may ask, such as http://localhost:3000; or *"),
    ("allowed-hosts", str, "+", [], "NAME", "host names besides localhost, behind a proxy on this machine"),
    ("adapter-folders", str, "+", [], "DIR", "allow requests to load adapters below DIR (default: none)"),
]
# command -> those of its flags that are no keys of the configuration: arguments of its `run`
COMMAND_FLAGS = {
    "predict": ("predict_data", "system", "predict_file", "predict_output"),
    "chat": ("system",),
    "preview": ("row",),
    "preprocess": ("report", "layout"),
    "fisher": ("output", "params"),
    "serve": tuple(row[0].replace("-", "_") for row in SERVE_FLAGS),
}

# command -> words that people try there, or the keys that they stand for -> the flag; "": there is none
OWN_WORDS = {
    "predict": {"prompt": "predict_data", "prompts": "predict_data", f"train_dataset.{DATA}": "predict_file"},
    "chat": {"prompt": "", "prompts": ""},
    "serve": {"adapters": "lora-modules"},
    "eval": {f"train_dataset.{DATA}": "eval_dataset_dir"},
    "convert": {"output_dir": "output"},
    "convert-adapter": {"output_dir": "output"},
}


# What --help shows of the shared flags by command; all take all, as they share the YAML.
DEVICE = tuple(row[0] for row in FLAGS["device and seed"])
OF_ROWS = ("train_dataset_dir", "eval_dataset_dir", "num_samples", "fill")
OF_ANSWERS = tuple(row[0] for row in FLAGS["generation"])
OF_PREDICT = ("predict_data", "predict_file", "predict_output")
OF_EVAL = ("prompts_file", "tasks", "num_fewshot", "limit")
OF_TRAINING = tuple(row[0] for row in FLAGS["training"] if row[0] != "seq_length")
COMPATIBLE = tuple(row[0] for row in FLAGS["MindFormers compatibility"])
ANSWERING = {*OF_ROWS, *OF_TRAINING, *OF_EVAL, *COMPATIBLE, "seq_length", "dry_run", "preset"}
NOT_SHOWN: dict[str, set[str]] = {
    "finetune": {*OF_PREDICT, "system"},
    "predict": ANSWERING,
    "chat": {*ANSWERING, *OF_PREDICT},
    "serve": {*ANSWERING, *OF_PREDICT, "system"},
    "eval": {*OF_PREDICT, *OF_TRAINING, *COMPATIBLE, "train_dataset_dir", "dry_run", "preset", "system"},
    "sequence": {*OF_PREDICT, "system", "dry_run", "train_dataset_dir"},
    "fisher": {*OF_PREDICT, *OF_EVAL, *OF_ANSWERS, *COMPATIBLE, "eval_dataset_dir", "system", "dry_run"},
    "estimate": {*OF_PREDICT, *OF_ANSWERS, "system", "dry_run"},
    "preview": {*OF_PREDICT, *OF_ANSWERS, *OF_TRAINING, *COMPATIBLE, *DEVICE, "system", "dry_run", "preset"},
    "preprocess": {*OF_PREDICT, *OF_ANSWERS, *OF_TRAINING, *COMPATIBLE, *DEVICE, "system", "dry_run", "preset"},
}


def add_flags(parser: argparse.ArgumentParser, command: str | None = None) -> None:
    """Adds the flags that all commands with a configuration share; its help shows those of ``command``, or all."""
    hidden = NOT_SHOWN.get(command or "", set())

    def shown(flag: str, text: str) -> str:
        return argparse.SUPPRESS if flag in hidden else text

    parser.add_argument("--config", metavar="YAML", help="configuration in MindFormers' schema")
    groups = {}
    for title, rows in FLAGS.items():
        group = groups[title] = parser.add_argument_group(title)
        for flag, _, kind, placeholder, text in rows:
            several = "+" if flag in SEVERAL else None
            group.add_argument(f"--{flag}", type=kind, nargs=several, metavar=placeholder, help=shown(flag, text))
            for alias in (name for name, meant in ALIASES.items() if meant == flag):
                group.add_argument(f"--{alias}", type=kind, metavar=placeholder, help=argparse.SUPPRESS)
    for flag, _, kind, count in IDLE_FLAGS:
        groups["MindFormers compatibility"].add_argument(f"--{flag}", type=kind, nargs=count, help=argparse.SUPPRESS)
    parser.epilog = (
        f"Other names: {', '.join(f'--{alias} for --{flag}' for alias, flag in ALIASES.items() if flag not in hidden)}."
    )
    if "run_mode" not in hidden:
        idle = " ".join(row[0] for row in IDLE_FLAGS)
        parser.epilog += f" MindFormers' other flags are accepted and have no effect: {idle}."
    if hidden:
        parser.epilog += " Flags of other commands are accepted, as they set keys of the same YAML."

    def add(title: str, flag: str, text: str, **how: Any) -> None:
        groups[title].add_argument(f"--{flag}", help=shown(flag, text), **how)

    text = "replace {{NAME}} in the data with TEXT; repeatable"
    add("model and data", "fill", text, type=flag_fill, action="append", default=[], metavar="NAME=TEXT")
    text = "only check settings, data, memory and disk, for N processes (1)"
    add("training", "dry_run", text, type=flag_processes, nargs="?", const=1, metavar="N")
    text = "few_rows (tens), small_dataset (hundreds), large_dataset (tens of thousands)"
    add("training", "preset", text, metavar="NAME")
    add("generation", "predict_data", "prompts", nargs="+", metavar="TEXT")
    add("generation", "predict_file", "rows with prompts: file, folder or glob", type=flag_path, metavar="PATH")
    text = "their answers (answers.jsonl in output_dir); an interrupted file is continued"
    add("generation", "predict_output", text, type=flag_path, metavar="FILE")
    add("generation", "system", "system message before the conversation (predict, chat)", metavar="TEXT")
    group = parser.add_argument_group("any key of the YAML")
    text = "such as optimizer.eps=1e-6; also as --optimizer.eps 1e-6"
    group.add_argument("--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_command_flags(command: str, parser: argparse.ArgumentParser) -> None:
    """Adds the flags that ``command`` alone has."""
    if command == "preview":
        parser.add_argument("--row", type=flag_int, metavar="N", help="only row N, counted as in error lines")
    if command == "fisher":
        parser.add_argument("--output", metavar="FILE", help="file to write (default: the one that ewc reads)")
        text = "regular expression that matches whole names of the parameters to measure (default: all that train)"
        parser.add_argument("--params", metavar="REGEX", help=text)
    if command == "preprocess":
        parser.add_argument("--report", action="store_true", help="describe the data, write no rows")
        text = "mindformers: rows padded to seq_length + 1 tokens; rows: not padded"
        parser.add_argument("--layout", choices=("rows", "mindformers"), default="rows", help=text)
    if command == "serve":
        group = parser.add_argument_group("server")
        for name, kind, nargs, default, placeholder, text in SERVE_FLAGS:
            group.add_argument(f"--{name}", type=kind, nargs=nargs, default=default, metavar=placeholder, help=text)
