"""``adapter_config.json``, both ways."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.lowrank import takes_out
from lora_ms.adapters.matching import Place, leaf_of
from lora_ms.errors import LoraMsError

# keys that change numbers and are not computed here, beside those that are empty
UNSUPPORTED = (
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "velora_config",
)
# ways to start that leave nothing behind: the file holds what came of them
DONE = ("eva", "mica", "gaussian", "orthogonal")


@dataclass(frozen=True)
class Adapted:
    """What stands in a model: ranks and alphas of its adapters, layers saved whole, and layers left plain, by path."""

    places: Mapping[str, Place]
    saved: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


def to_peft(config: LoraConfig, found: Adapted, base_model: str | None) -> dict:
    """adapter_config.json of the adapter ``found``.

    ``target_modules`` are leaf names, or whole paths where a leaf name would take a plain layer in. Ranks and alphas
    that differ from the commonest stand in the two patterns, by path. An adapter that took its start out of the
    weights is of twice the rank, on the weights as they were.
    """
    places = found.places
    if isinstance(config.init_lora_weights, str) and takes_out(config.init_lora_weights):
        wider = 2**0.5 if config.use_rslora else 2.0
        places = {name: Place(2 * rank, wider * alpha) for name, (rank, alpha) in places.items()}
    leaves = {leaf_of(name) for name in places}
    exact = any(leaf_of(name) in leaves for name in found.plain)
    ranks, alphas = (_commonest([place[i] for place in places.values()]) for i in (0, 1))
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": sorted(places if exact else leaves),
        "exclude_modules": None,
        "layers_to_transform": None,
        "modules_to_save": sorted(found.saved) or None,
        "lora_alpha": _plain(alphas),
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    if isinstance(config, AdaLoraConfig):
        return {
            "peft_type": "ADALORA",
            **common,
            "r": config.lora_rank,
            "init_r": config.lora_rank,
            "target_r": config.target_rank,
            "tinit": config.tinit,
            "tfinal": config.tfinal,
            "deltaT": config.delta_t,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "orth_reg_weight": config.orth_reg_weight,
            "total_step": config.total_steps or None,
            "rank_pattern": {f"{name}.lora_E": list(kept) for name, kept in config.kept.items()} or None,
        }
    return {
        "peft_type": "LORA",
        **common,
        "r": ranks,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {name: rank for name, (rank, _) in places.items() if rank != ranks},
        "alpha_pattern": {name: _plain(alpha) for name, (_, alpha) in places.items() if alpha != alphas},
        # an older PEFT refuses a key that it does not know
        **({"lora_bias": True} if config.lora_bias else {}),
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _commonest(values: list) -> float:
    return max(values, key=values.count)


def from_peft(peft: Mapping, where: str) -> LoraConfig:
    """Of a parsed adapter_config.json.

    Raises:
        LoraMsError: another peft_type, or keys that ask for what is not computed here; all are listed.
    """
    kind = peft.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise LoraMsError(f"{where}: peft_type {kind!r} is not supported; supported: LORA, ADALORA")
    faults = [f"{key}: {peft[key]}" for key in UNSUPPORTED if peft.get(key)]
    init = peft.get("init_lora_weights", True)
    if faults:
        raise LoraMsError(f"{where}: not supported: {', '.join(faults)}")
    if str(init).startswith("pissa_niter_"):
        raise LoraMsError(
            f"{where}: what {init} took out of the weights was random and is not in the file; "
            "save it in PEFT with path_initial_model_for_weight_conversion"
        )
    adalora = kind == "ADALORA"
    missing = [key for key in ("init_r" if adalora else "r", "lora_alpha", "target_modules") if key not in peft]
    if missing:
        raise LoraMsError(f"{where}: {', '.join(missing)} is missing")
    try:
        common = {
            "lora_alpha": peft["lora_alpha"],
            "lora_dropout": peft.get("lora_dropout") or 0.0,
            "target_modules": peft["target_modules"] or (),
            "exclude_modules": peft.get("exclude_modules") or (),
            "layers_to_transform": peft.get("layers_to_transform"),
            "layers_pattern": peft.get("layers_pattern") or (),
            "modules_to_save": peft.get("modules_to_save") or (),
            "bias": peft.get("bias") or "none",
        }
        if adalora:
            return _adalora(peft, common)
        return LoraConfig(
            peft["r"],
            **common,
            rank_pattern=peft.get("rank_pattern") or {},
            alpha_pattern=peft.get("alpha_pattern") or {},
            use_rslora=bool(peft.get("use_rslora")),
            use_dora=bool(peft.get("use_dora")),
            lora_bias=bool(peft.get("lora_bias")),
            init_lora_weights=True if isinstance(init, bool) or init is None or init in DONE else init,
        )
    except LoraMsError as error:
        raise LoraMsError(f"{where}: {error}") from None
    except TypeError as error:
        raise LoraMsError(f"{where}: a value of the wrong type ({error})") from None


def _adalora(peft: Mapping, common: dict) -> AdaLoraConfig:
    config = AdaLoraConfig(
        peft["init_r"],
        **common,
        target_rank=peft.get("target_r", 8),
        tinit=peft.get("tinit") or 0,
        tfinal=peft.get("tfinal") or 0,
        delta_t=peft.get("deltaT") or 1,
        beta1=peft.get("beta1", 0.85),
        beta2=peft.get("beta2", 0.85),
        orth_reg_weight=peft.get("orth_reg_weight", 0.5),
        total_steps=peft.get("total_step") or 0,
    )
    kept = {}
    for key, mask in (peft.get("rank_pattern") or {}).items():
        name = key.removeprefix("base_model.model.").split(".lora_E")[0]
        kept[name] = tuple(bool(flag) for flag in mask)
    return replace(config, kept=kept)
