"""What MindFormers trains: its rows, its configuration, and its model with an adapter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn

from lora_ms.adapters.inject import freeze
from lora_ms.adapters.matching import check_listed, leaf_of, matches
from lora_ms.adapters.methods import METHODS
from lora_ms.bridge import model, package, settings, trainer
from lora_ms.config import PetConfig, RunConfig
from lora_ms.config.model import method_keys
from lora_ms.data.mindrecord import fixed_width, write_mindrecord
from lora_ms.data.readers import find_files
from lora_ms.data.tokenizer import pad_id, save_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.recipes import data
from lora_ms.recipes.adapter import adapter_config
from lora_ms.recipes.model import decoder_config, read_sizes
from lora_ms.runtime import device
from lora_ms.runtime.choice import chosen
from lora_ms.runtime.device import Runtime
from lora_ms.train.log import Tee

FOLDER = "mindformers"  # under output_dir: the rows and the configuration that MindFormers reads
# what only our own loop does: key of pet_config -> the value that switches it off
NATIVE_KEYS = {"loraplus_lr_ratio": 1.0, "neftune_noise_alpha": 0.0}
# of a method's keys, those that MindPet's LoRA has
MINDPET_KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "exclude_layers", *NATIVE_KEYS)


@dataclass(frozen=True)
class MindRecordRows:
    """Rows that MindFormers trains or evaluates on: MindRecord files, and the number of their rows."""

    files: list[Path]
    count: int


def check(config: RunConfig) -> PetConfig:
    """The adapter's section.

    Raises:
        LoraMsError: keys that this backend does not support; all are listed.
    """
    pet = config.pet_config
    if pet is None:
        raise LoraMsError("backend mindformers trains adapters: give pet_config, or leave the backend native")
    odd = [f"pet_config.{key}" for key, idle in NATIVE_KEYS.items() if getattr(pet, key) != idle]
    odd += [] if METHODS[pet.pet_type].WITH_MINDFORMERS else [f"pet_config.pet_type {pet.pet_type}"]
    odd += ["train_dataset.validation_split"] if config.train_dataset.validation_split else []
    odd += ["train_dataset.mix"] if config.train_dataset.mix else []
    odd += [key for key, value in (("report_to", config.report_to), ("profile", config.profile)) if value]
    if odd:
        raise LoraMsError(
            f"backend mindformers does not support {', '.join(odd)}: leave them out, or use backend native"
        )
    ours = [key for key in method_keys(METHODS[pet.pet_type]) if key not in MINDPET_KEYS and is_changed(pet, key)]
    if pet.lora_impl == "mindpet" and ours:
        raise LoraMsError(f"MindPet's LoRA does not support {', '.join(ours)}: set pet_config.lora_impl: lora_ms")
    if config.resume_training and (Path(config.load_checkpoint) / "config.json").is_file():
        raise LoraMsError(
            "resume_training with backend mindformers expects MindFormers' checkpoint in load_checkpoint "
            "(output_dir/checkpoint of the run to go on with), not a Hugging Face folder"
        )
    return pet


def is_changed(pet: PetConfig, key: str) -> bool:
    """Whether the value of ``key`` is other than its default."""
    return getattr(pet, key) != type(pet).model_fields[key].get_default(call_default_factory=True)


def start(config: RunConfig) -> Runtime:
    """The device; on Ascend MindFormers prepares it later, by its own context keys."""
    context = config.context
    later = Runtime(chosen(context.device_target))
    if config.use_parallel and not later.uses_host_memory:  # msrun tells each process its number
        later = replace(later, rank=int(os.environ.get("RANK_ID", 0)), world=int(os.environ.get("MS_WORKER_NUM", 1)))
    if later.is_main:
        print(*config.notices(), sep="\n", end="\n" if config.notices() else "")
    if not later.uses_host_memory:
        return later
    runtime, notices = device.setup(
        context.device_target, context.device_id, config.seed, graph_cache=context.graph_cache
    )
    print(*notices, sep="\n", end="\n" if notices else "")
    return runtime


def sizes_of(config: RunConfig) -> DecoderConfig:
    """The model's sizes: of a folder of MindFormers' checkpoints those of the YAML, as of a single checkpoint."""
    path = Path(config.load_checkpoint)
    if path.is_dir() and not (path / "config.json").is_file():
        return decoder_config(config.model.sizes)
    return read_sizes(config)


def rows_of(config: RunConfig, name: str, sizes: DecoderConfig, tokenizer: Any, folder: Path) -> MindRecordRows:
    """The rows of ``train`` or ``eval`` as MindFormers reads them: seq_length + 1 tokens in training, seq_length in
    evaluation. Files that have them so are used where they are; others are written to ``folder``.
    """
    section = config.train_dataset if name == "train" else config.eval_dataset
    sources = data.sources_of(section, name)
    width = data.seq_length(config, sizes.max_position_embeddings) + (name == "train")
    preparation = data.preparation_of(config, section, sizes.max_position_embeddings, sizes.vocab_size)
    if section.num_samples is None:
        files = [file for source in sources for file in find_files(source, preparation.split)]
        count = fixed_width(files, width)
        if count:
            return MindRecordRows(files, count)
    rows = data.rows_of(section, sources, tokenizer, preparation)
    print(*(line for report in rows.reports for line in report.lines()), sep="\n")
    path = folder / f"{name}.mindrecord"
    write_mindrecord(path, rows.store, width, pad_id(tokenizer))
    return MindRecordRows([path], len(rows.store))


def pet_settings(pet: PetConfig, layers: list[str], on_cpu: bool) -> dict[str, Any]:
    """MindPet's configuration; a list of modules becomes MindFormers' expression for the same leaf names.

    layers: MindFormers' linear layers, by Hugging Face's paths.

    Raises:
        LoraMsError: it matches no layer.
    """
    targets: Any = pet.target_modules
    names = [name for name in layers if matches(name, targets if isinstance(targets, str) else tuple(targets))]
    if not names:
        leaves = ", ".join(sorted({leaf_of(name) for name in layers}))
        raise LoraMsError(f"target_modules {targets!r} matches no layer; could match: {leaves}, or all-linear")
    check_listed("target_modules", targets, layers)
    theirs = dict.fromkeys(leaf_of(model.legacy_path(name)) for name in names)
    given = {key: getattr(pet, key) for key in ("exclude_layers", "freeze_include", "freeze_exclude")}
    types = {} if on_cpu else {"param_init_type": pet.param_init_type, "compute_dtype": pet.compute_dtype}
    return {
        "pet_type": "lora",
        "lora_rank": pet.lora_rank,
        "lora_alpha": pet.lora_alpha,
        "lora_dropout": pet.lora_dropout,
        "target_modules": "|".join(f"{leaf}$" for leaf in theirs),
        **{key: value for key, value in given.items() if value},
        **types,
    }


@contextmanager
def explained(config_file: Path) -> Iterator[None]:
    """Turns an error inside MindFormers into one line; its traceback is shown with --debug."""
    try:
        yield
    except LoraMsError:
        raise
    except Exception as error:  # of another package: any kind
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise LoraMsError(f"MindFormers stopped: {text[0]} (its configuration: {config_file}; see run.log)") from error


class MindFormersModel:
    """MindFormers' model with an adapter, and the configuration that MindFormers reads for it."""

    def __init__(self, config: RunConfig, pet: PetConfig | None, sizes: DecoderConfig, runtime: Runtime, log: Tee):
        self.config = config
        self.pet = pet
        self.runtime = runtime
        self.log = log
        self.heads = model.heads_of(sizes)
        self.output_dir = Path(config.output_dir)
        with package.silenced(log):
            self.package, notices = package.load()
            trainer.register(self.package)
        print(*notices, sep="\n", end="\n" if notices else "")
        given = config.model_dump(by_alias=True, exclude_unset=True)
        model_given = given.get("model", {}).get("model_config", {})
        self.length = data.seq_length(config, sizes.max_position_embeddings)
        self.llama = model.llama_sizes(sizes, self.length) | settings.plain(
            {key: value for key, value in model_given.items() if key not in settings.OUR_MODEL and value is not None}
        )
        self.given = given
        self.fused = bool(self.llama.get("qkv_concat"))  # q, k and v in one matrix

    @property
    def on_cpu(self) -> bool:
        return self.runtime.uses_host_memory

    def settings(self, train: MindRecordRows, held_out: MindRecordRows | None) -> dict[str, Any]:
        """MindFormers' configuration; prints where it differs from the user's."""
        c = self.config
        found = settings.for_mindformers(
            self.given,
            c.mindformers_sections,
            train_files=list(map(str, train.files)),
            eval_files=[] if held_out is None else list(map(str, held_out.files)),
            max_steps=c.runner_config.max_steps,
        )
        hugging_face = (Path(c.load_checkpoint) / "config.json").is_file()
        found |= {"output_dir": str(self.output_dir), "load_checkpoint": "" if hugging_face else c.load_checkpoint}
        if found["load_checkpoint"].endswith(".safetensors"):
            found.setdefault("load_ckpt_format", "safetensors")
        found["run_mode"], found["seed"] = "finetune", c.seed
        found["runner_config"]["batch_size"] = c.batch_size
        unused = settings.without_effect(self.given)
        lines = [f"no effect with backend mindformers: {', '.join(unused)}"] if unused else []
        lines += settings.replace_dropped(found)
        lines += [f"on the CPU: {line}" for line in settings.adapt_to_cpu(found, self.llama)] if self.on_cpu else []
        print(*lines, sep="\n", end="\n" if lines else "")
        found["model"] = {"model_config": {"type": "LlamaConfig", **self.llama}, "arch": {"type": "LlamaForCausalLM"}}
        return found

    def read(self, file: Path) -> Any:
        """MindFormers' own object of the configuration in ``file``; builds its context, too."""
        theirs = self.package.MindFormerConfig(str(file))
        self.package.build_context(theirs)
        ms.set_seed(self.config.seed)
        return theirs

    def network(self, theirs: Any) -> nn.Cell:
        """MindFormers' model with its weights and its adapter; ``theirs``: from ``read``."""
        checkpoint = Path(self.config.load_checkpoint)
        pet = self.pet
        parallel = model.parallel_config(self.package, theirs)
        network = self.package.LlamaForCausalLM(self.package.LlamaConfig(**self.llama, parallel_config=parallel))
        if (checkpoint / "config.json").is_file():
            model.fill(network, checkpoint, self.heads, self.fused)
        self.linear = list(model.linear_layers(self.package, network))
        if pet is None:
            return network
        self.lora = adapter_config(pet)
        if pet.lora_impl == "mindpet":
            asked = pet_settings(pet, self.linear, self.on_cpu)
            network = self.package.get_pet_model(network, asked)
        else:
            model.inject(self.package, network, self.lora, self.runtime.operators)
            freeze(network, pet.freeze_include, pet.freeze_exclude)
        if self.config.load_adapter:
            self.load_adapter(network, Path(self.config.load_adapter))
        return network

    def load_adapter(self, network: nn.Cell, folder: Path) -> None:
        """Reads a PEFT adapter into the adapter of ``network``."""
        model.load_factors(network, folder, self.lora, self.heads, self.fused)

    def describe(self, network: nn.Cell, pet: PetConfig) -> str:
        """What trains."""
        parameters = [p for p in network.get_parameters() if p.ndim]
        trained = sum(p.size for p in parameters if p.requires_grad)
        total, modules = sum(p.size for p in parameters), len(model.factor_parameters(network))
        whose = {"mindpet": "MindPet", "lora_ms": "lora_ms"}[pet.lora_impl]
        share = f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f}%)"
        return f"LoRA of {whose} on {modules} of MindFormers' modules: {share}"

    def save_adapter(self, network: nn.Cell, tokenizer: Any, folder: Path) -> None:
        """Writes the adapter of ``network`` as a PEFT folder, with the tokenizer."""
        model.save_adapter(network, folder, self.lora, self.heads, self.linear, self.config.load_checkpoint)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
