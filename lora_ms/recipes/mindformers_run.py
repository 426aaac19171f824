"""The parts of a run with MindFormers: its rows, its configuration, its model with an adapter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn

from lora_ms.adapters import inject as injection
from lora_ms.adapters.matching import leaf_of, matches
from lora_ms.bridge import model, package, settings, trainer
from lora_ms.config import PetConfig, RunConfig
from lora_ms.data.mindrecord import fixed_width, write_mindrecord
from lora_ms.data.tokenizer import pad_id
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.recipes import data
from lora_ms.recipes import session as common
from lora_ms.recipes.adapter import adapter_config
from lora_ms.runtime import device as runtime_module
from lora_ms.runtime.device import Runtime
from lora_ms.train.log import Tee

FOLDER = "mindformers"  # below output_dir: the rows and the configuration that MindFormers is given
# what only our own training does: key of pet_config, and the value that asks for nothing
NATIVE_KEYS = {"loraplus_lr_ratio": 1.0, "neftune_noise_alpha": 0.0}
# what MindPet's LoRA lacks
OURS: dict[str, Any] = {
    **{name: False for name in ("use_rslora", "use_dora", "lora_bias")},
    **{name: {} for name in ("rank_pattern", "alpha_pattern")},
    **{name: [] for name in ("exclude_modules", "layers_pattern", "layer_groups", "modules_to_save")},
    "layers_to_transform": None,
    "bias": "none",
    "init_lora_weights": True,
}


@dataclass(frozen=True)
class Rows:
    """What is trained or evaluated on: a MindRecord file or folder, and how many rows it has."""

    path: Path
    count: int


def check(config: RunConfig) -> PetConfig:
    """The adapter's section.

    Raises:
        LoraMsError: a key that this backend has nothing for; all are listed.
    """
    pet = config.pet_config
    if pet is None:
        raise LoraMsError("backend mindformers trains adapters: give pet_config, or leave the backend native")
    odd = [f"pet_config.{key}" for key, idle in NATIVE_KEYS.items() if getattr(pet, key) != idle]
    odd += ["pet_config.pet_type adalora"] if pet.pet_type == "adalora" else []
    odd += ["train_dataset.validation_split"] if config.train_dataset.validation_split else []
    odd += ["train_dataset.mix"] if config.train_dataset.mix else []
    odd += [key for key, value in (("report_to", config.report_to), ("profile", config.profile)) if value]
    if odd:
        raise LoraMsError(f"backend mindformers goes without {', '.join(odd)}: leave them out, or the backend native")
    ours = [key for key, idle in OURS.items() if getattr(pet, key) != idle]
    if pet.lora_impl == "mindpet" and ours:
        raise LoraMsError(f"MindPet's LoRA goes without {', '.join(ours)}: set pet_config.lora_impl: lora_ms")
    if config.resume_training and (Path(config.load_checkpoint) / "config.json").is_file():
        raise LoraMsError(
            "resume_training with backend mindformers wants MindFormers' checkpoint in load_checkpoint "
            "(output_dir/checkpoint of the run to go on with), not a Hugging Face folder"
        )
    return pet


def start(config: RunConfig) -> Runtime:
    """The device; on Ascend MindFormers prepares it later, by its own context keys."""
    context = config.context
    if context.device_target != "CPU" and runtime_module.ascend_is_present():
        started = config.use_parallel  # by msrun, which tells each process its number
        rank, world = (int(os.environ.get(n, d)) for n, d in (("RANK_ID", 0), ("MS_WORKER_NUM", 1)))
        return Runtime("Ascend", rank, world) if started else Runtime("Ascend")
    runtime, notices = runtime_module.setup(context.device_target, context.device_id, config.seed)
    print(*notices, sep="\n", end="\n" if notices else "")
    return runtime


def sizes_of(config: RunConfig) -> DecoderConfig:
    """The model's sizes; of a folder of MindFormers' checkpoints by the YAML, as of its files."""
    path = Path(config.load_checkpoint)
    if path.is_dir() and not (path / "config.json").is_file():
        return common.decoder_config(config.model.sizes)
    return common.read_sizes(config)


def rows_of(config: RunConfig, name: str, sizes: DecoderConfig, tokenizer: Any, folder: Path) -> Rows:
    """The rows of ``train`` or ``eval`` as MindFormers reads them: of seq_length + 1 tokens in training, of seq_length
    in evaluation. Those that are not yet so are written to ``folder``."""
    section = config.train_dataset if name == "train" else config.eval_dataset
    sources = data.sources_of(section, name)
    width = data.seq_length(config, sizes.max_position_embeddings) + (name == "train")
    count = fixed_width(Path(sources[0]), width) if len(sources) == 1 else 0
    if count:
        return Rows(Path(sources[0]), count)
    how = data.preparation(config, section, sizes.max_position_embeddings, sizes.vocab_size)
    store, reports, _ = data.rows_of(section, sources, tokenizer, how)
    print(*(line for report in reports for line in report.lines()), sep="\n")
    path = folder / f"{name}.mindrecord"
    write_mindrecord(path, store, width, pad_id(tokenizer))
    return Rows(path, len(store))


def pet_settings(pet: PetConfig, layers: list[str], on_cpu: bool) -> dict[str, Any]:
    """MindPet's configuration; a list of modules becomes MindFormers' expression for the same leaf names.

    layers: MindFormers' linear layers, by Hugging Face's paths.

    Raises:
        LoraMsError: no layer is meant.
    """
    targets: Any = pet.target_modules
    names = [name for name in layers if matches(name, targets if isinstance(targets, str) else tuple(targets))]
    if not names:
        leaves = ", ".join(sorted({leaf_of(name) for name in layers}))
        raise LoraMsError(f"target_modules {targets!r} matches no layer; could match: {leaves}, or all-linear")
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
    """An error inside MindFormers as one line; its traceback is shown with --debug."""
    try:
        yield
    except LoraMsError:
        raise
    except Exception as error:  # whatever another package stops at
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise LoraMsError(f"MindFormers stopped: {text[0]} (its configuration: {config_file}; see run.log)") from error


class Run:
    """One run: the network with its adapter, and what the parts of it share."""

    def __init__(self, config: RunConfig, pet: PetConfig | None, sizes: DecoderConfig, runtime: Runtime, log: Tee):
        self.config, self.pet, self.sizes, self.runtime, self.log = config, pet, sizes, runtime, log
        self.heads, self.output_dir = model.heads_of(sizes), Path(config.output_dir)
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

    @property
    def on_cpu(self) -> bool:
        return self.runtime.device == "CPU"

    def prepare(self, train: Rows, held_out: Rows | None) -> dict[str, Any]:
        """MindFormers' configuration, in a file of its own; says what is otherwise than the user has it."""
        c = self.config
        eval_file = None if held_out is None else str(held_out.path)
        found = settings.for_mindformers(
            self.given, c.mindformers_sections, str(train.path), eval_file, c.runner_config.max_steps
        )
        hugging_face = (Path(c.load_checkpoint) / "config.json").is_file()
        found |= {"output_dir": str(self.output_dir), "load_checkpoint": "" if hugging_face else c.load_checkpoint}
        if found["load_checkpoint"].endswith(".safetensors"):
            found.setdefault("load_ckpt_format", "safetensors")
        found["run_mode"], found["seed"] = "finetune", c.seed
        found["runner_config"]["batch_size"] = c.batch_size
        idle = settings.idle(self.given)
        lines = [f"no effect with backend mindformers: {', '.join(idle)}"] if idle else []
        lines += settings.everywhere(found)
        lines += [f"on the CPU: {line}" for line in settings.on_cpu(found, self.llama)] if self.on_cpu else []
        print(*lines, sep="\n", end="\n" if lines else "")
        found["model"] = {"model_config": {"type": "LlamaConfig", **self.llama}, "arch": {"type": "LlamaForCausalLM"}}
        return found

    def begin(self, file: Path) -> Any:
        """MindFormers' configuration as it reads it, its context built."""
        theirs = self.package.MindFormerConfig(str(file))
        self.package.build_context(theirs)
        ms.set_seed(self.config.seed)
        return theirs

    def network(self, theirs: Any) -> nn.Cell:
        """MindFormers' model with its weights and its adapter."""
        checkpoint, pet = Path(self.config.load_checkpoint), self.pet
        parallel = model.parallel_config(self.package, theirs)
        network = self.package.LlamaForCausalLM(self.package.LlamaConfig(**self.llama, parallel_config=parallel))
        fused = bool(self.llama.get("qkv_concat"))
        if (checkpoint / "config.json").is_file():
            model.fill(network, checkpoint, self.heads, fused)
        self.linear = list(model.linear_layers(self.package, network))
        if pet is None:
            return network
        self.lora = adapter_config(pet)
        if pet.lora_impl == "mindpet":
            asked = pet_settings(pet, self.linear, self.on_cpu)
            network = self.package.get_pet_model(network, asked)
        else:
            model.inject(self.package, network, self.lora, self.runtime.operators)
            injection.freeze(network, pet.freeze_include, pet.freeze_exclude)
        if self.config.load_adapter:
            model.load_factors(network, Path(self.config.load_adapter), self.lora, self.heads, fused)
        return network

    def describe(self, network: nn.Cell, pet: PetConfig) -> str:
        """What trains."""
        parameters = [p for p in network.get_parameters() if p.ndim]
        trained = sum(p.size for p in parameters if p.requires_grad)
        total, modules = sum(p.size for p in parameters), len(model.factor_parameters(network))
        whose = {"mindpet": "MindPet", "lora_ms": "lora_ms"}[pet.lora_impl]
        share = f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f}%)"
        return f"LoRA of {whose} on {modules} of MindFormers' modules: {share}"

    def save(self, network: nn.Cell, tokenizer: Any) -> Path:
        """Writes ``output_dir/adapter``."""
        folder = self.output_dir / "adapter"
        model.save_adapter(network, folder, self.lora, self.heads, self.linear, self.config.load_checkpoint)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder
