"""Words of LLaMA-Factory, of transformers' TrainingArguments, TRL and PEFT, and what a YAML has in their place."""

SIZES = "model.model_config"
PET = f"{SIZES}.pet_config"
SAVING = "callbacks=[{type: CheckpointMonitor, %s: N}]"

# what is written here: the dotted path of a key, after "=" its value where that says the same
_KEYS: dict[str, tuple[str, ...]] = {
    "load_checkpoint": (
        *("model", "model_name", "model_name_or_path", "model_id", "model_path", "model_dir", "base_model"),
        *("base_model_name_or_path", "pretrained_model_name_or_path", "checkpoint", "ckpt"),
    ),
    "load_adapter": (
        *("lora", "adapter", "adapter_name_or_path", "adapter_path", "adapter_dir", "lora_path", "peft_model"),
    ),
    "train_dataset.data_loader.dataset_dir": (
        *("data", "dataset", "dataset_dir", "dataset_name", "dataset_path", "data_path", "data_dir"),
        *("train_data", "train_dataset", "train_dataset_dir", "train_file", "train_path"),
    ),
    "eval_dataset.data_loader.dataset_dir": (
        *("eval_data", "eval_dataset", "eval_dataset_dir", "eval_file", "validation_file", "test_file"),
    ),
    "output_dir": ("output", "output_path", "out", "out_dir", "save_dir", "save_path", "export_dir"),
    "runner_config.epochs": ("num_train_epochs", "num_epochs", "n_epochs", "train_epochs"),
    "runner_config.batch_size": (
        *("batch", "batch_size", "per_device_train_batch_size", "train_batch_size", "micro_batch_size", "bs"),
    ),
    "eval_dataset.batch_size": ("per_device_eval_batch_size", "eval_batch_size"),
    "runner_config.gradient_accumulation_steps": ("gradient_accumulation", "grad_accum", "accumulation_steps"),
    "runner_config.logging_steps": ("log_steps",),
    "lr_schedule.learning_rate": ("learning_rate", "lr"),
    "lr_schedule.type": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "lr_schedule.warmup_ratio": ("warmup",),
    "optimizer.type": ("optim",),
    "optimizer.beta1": ("adam_beta1",),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("adam_epsilon",),
    f"{SIZES}.seq_length": ("cutoff_len", "max_seq_length", "max_seq_len", "model_max_length", "block_size"),
    f"{SIZES}.compute_dtype": ("dtype", "torch_dtype", "precision", "infer_dtype"),
    f"{SIZES}.compute_dtype=bfloat16": ("bf16",),
    f"{SIZES}.compute_dtype=float16": ("fp16",),
    f"{SIZES}.quantization_config=nf4": ("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization"),
    f"{SIZES}.max_new_tokens": ("max_tokens",),
    f"{PET}.lora_rank": ("lora_r", "r", "rank"),
    f"{PET}.lora_alpha": ("alpha",),
    f"{PET}.lora_dropout": ("dropout",),
    f"{PET}.target_modules": ("lora_target", "lora_target_modules", "target", "targets"),
    f"{PET}.modules_to_save": ("additional_target",),
    f"{PET}.pet_type": ("peft_type",),
    f"{PET}.init_lora_weights=pissa": ("pissa_init",),
    "processor.tokenizer.chat_template": ("template",),
    "processor.tokenizer.vocab_file": ("tokenizer", "tokenizer_name", "tokenizer_name_or_path"),
    "train_dataset.num_samples": ("max_samples", "max_train_samples"),
    "eval_dataset.num_samples": ("max_eval_samples",),
    "train_dataset.validation_split": ("val_size", "test_size"),
    "train_dataset.packing": ("neat_packing",),
    "recompute_config.recompute": ("gradient_checkpointing",),
    "resume_training": ("resume_from_checkpoint", "resume"),
    "eval_step_interval": ("eval_steps",),
    "do_eval=True": ("eval_strategy", "evaluation_strategy"),
    "evaluation.patience": ("early_stopping_patience", "early_stopping_steps"),
    "context.device_target": ("device", "device_type"),
    "use_parallel=True": ("distributed",),
    SAVING % "save_checkpoint_steps": ("save_steps", "save_strategy"),
    SAVING % "keep_checkpoint_max": ("save_total_limit",),
}
OTHER_WORDS = {word: key for key, words in _KEYS.items() for word in words}
NO = ("false", "no", "none", "off", "0")
YES = ("", "true", "yes", "on", "1", "steps")  # "": no value is given
SAME = {"quantization_bit": ("", "4"), "quantization": ("", "4", "nf4"), "load_in_8bit": ()}  # else YES


def meaning(word: str, given: str = "") -> tuple[str, str, str]:
    """What stands for ``word`` with the value ``given``: the key, its value ("": the same), and whether "it is" that or
    "the nearest is", as the value says something else. All "" for a word that is not known; no key where it is best
    left out.
    """
    key, _, value = OTHER_WORDS.get(word, "").partition("=")
    given = given.lower()
    if word == "warmup" and given.isdecimal() and given != "0":
        return "lr_schedule.warmup_steps", "", "it is"
    if "N}" in value and given.isdecimal():
        return key, value.replace("N}", given + "}"), "it is"
    if value and given in NO:
        return "", "", "leave it out"
    same = given in SAME.get(word, YES)
    return key, value, "it is" if key and (same or not value) else "the nearest is" if key else ""
