"""What a configuration asks of several processes, checked before any weight is read."""

from lora_ms.adapters.methods.base import AdapterConfig
from lora_ms.adapters.peft_files import read_adapter_config
from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.models.decoder import DecoderConfig
from lora_ms.runtime import device as runtime_module
from lora_ms.runtime.device import Runtime

KEY = "parallel_config.model_parallel"
# what layers are split into: YAML key -> DecoderConfig's
DIVIDED = {
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
ENDS = ("lm_head", "model.embed_tokens")


def serve() -> int:
    """The work of msrun's scheduler, which lets the others meet and waits for them; returns the exit status."""
    runtime_module.setup("CPU", use_parallel=True)
    return 0


def sharing(config: RunConfig) -> int:
    """How many processes share one model."""
    return config.parallel_config.model_parallel if config.use_parallel else 1


def check(config: RunConfig, sizes: DecoderConfig) -> None:
    """Raises LoraMsError where ``parallel_config`` cannot be done, or not with this model and ``load_adapter``."""
    asked, n = config.parallel_config, sharing(config)
    if config.use_parallel:
        for key, value in (("pipeline_stage", asked.pipeline_stage), ("context_parallel", asked.context_parallel)):
            if value > 1:
                raise LoraMsError(f"parallel_config.{key} {value} is not supported: set it to 1 (model_parallel is)")
    odd = [f"{key} {getattr(sizes, name)}" for key, name in DIVIDED.items() if getattr(sizes, name) % n]
    if odd:
        raise LoraMsError(f"{KEY} {n} does not divide the model's {', '.join(odd)}: choose a number that does")
    if n > 1 and config.load_adapter:
        check_adapter(config, read_adapter_config(config.load_adapter), training=False)


def check_training(config: RunConfig, adapter: AdapterConfig | None) -> None:
    """Raises LoraMsError where processes that share a model cannot train what is asked for; None: all parameters."""
    if config.evaluation.prompts:
        check_alone(config, "evaluation.prompts")
    if sharing(config) > 1 and adapter is None:
        raise LoraMsError(f"{KEY} {sharing(config)} trains adapters only: give pet_config, or set it to 1")
    if sharing(config) > 1 and adapter is not None:
        check_adapter(config, adapter, training=True)


def check_adapter(config: RunConfig, adapter: AdapterConfig, training: bool) -> None:
    """Raises LoraMsError for what is not computed on split layers, by pet_config's keys."""
    found = adapter.not_split(training)
    found += [f"{name} in target_modules" for name in ENDS if adapter.choose(name) is not None]
    if found:
        raise LoraMsError(f"{KEY} {sharing(config)} goes without {', '.join(found)}: leave it out, or set it to 1")


def check_alone(config: RunConfig, what: str) -> None:
    """Raises LoraMsError where processes share a model, which ``what`` does not know."""
    if sharing(config) > 1:
        raise LoraMsError(f"{KEY} {sharing(config)}: {what} runs with the whole model in each process; set it to 1")


def notices(config: RunConfig, runtime: Runtime) -> list[str]:
    """What the user should know of the layout that was chosen."""
    asked = config.parallel_config
    if not config.use_parallel:
        n = asked.model_parallel
        return [f"{KEY} {n} has no effect: use_parallel is False"] if n > 1 else []
    layout = f"processes: {runtime.data_ranks} data-parallel x {runtime.shard.count} model-parallel"
    other = asked.data_parallel not in (1, runtime.data_ranks)
    return [layout + (f" (parallel_config.data_parallel is {asked.data_parallel})" if other else "")]
