"""What a run leaves under ``output_dir``, and how it writes and reads what it trains."""

from functools import partial
from pathlib import Path

from numpy.typing import NDArray

from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.methods.adalora_ranks import RankAllocator, save_plain_lora
from lora_ms.adapters.peft_format import adapter_tensors, restore_adapter, save_adapter
from lora_ms.models import hub
from lora_ms.models.decoder import CausalLM
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.train.checkpoint import FOLDERS, Weights

DATA_REPORT = "data_report.json"  # what became of the rows
RUN_LOG = "run.log"  # what was printed
PLAIN = "adapter_lora"  # besides adapter/: what an AdaLoRA run reached, as LoRA
SCHEDULE = ("target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight", "total_steps")


def earlier_outputs(output_dir: Path) -> list[str]:
    """Folders that an earlier run has left with what it trained."""
    return [name for name in (*FOLDERS, PLAIN) if (output_dir / name).is_dir()]


def adapter_line(output_dir: Path, folder: str) -> str:
    """Where the results of a run are, for the user; ``folder``: adapter or model."""
    return f"{folder}: {output_dir / folder}   loss plot: {output_dir / 'loss.png'}"


def weights_of(
    model: CausalLM,
    adapter: LoraConfig | None,
    tokenizer,
    ranks: RankAllocator | None = None,
    shard: Shard = WHOLE,
) -> Weights:
    """How what was trained is written and read; ``ranks`` are those of an AdaLoRA run."""
    whole: dict[str, NDArray] = {}  # the adapter's tensors, where the model is shared with other processes

    def collect() -> None:
        if adapter is not None and shard.count > 1:
            whole.update(adapter_tensors(model, adapter, shard))

    def save(path: Path, config: LoraConfig | None) -> None:
        if config is None:
            hub.save_directory(model, path)
        else:
            save_adapter(model, path, config, model.source, whole or None)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)

    def read(path: Path) -> None:
        if adapter is None:
            hub.restore(model, path)
        else:
            restore_adapter(model, path, adapter, shard)

    def finish(ranks: RankAllocator, path: Path) -> None:
        # what a checkpoint does not leave out: until the last cut every rank may come back
        config, plain = ranks.config(), path.with_name(PLAIN)
        save(path, config)
        save_plain_lora(model, plain, config, model.source)
        if tokenizer is not None:
            tokenizer.save_pretrained(plain)
        print(f"{ranks.summary()}; as plain LoRA in {plain}")

    identity = {} if adapter is None else adapter.identity()
    if ranks is not None:
        identity |= {key: getattr(adapter, key) for key in SCHEDULE}
    return Weights(
        "model" if adapter is None else "adapter",
        lambda path: save(path, adapter),
        read,
        identity,
        None if ranks is None else partial(finish, ranks),
        collect,
    )
