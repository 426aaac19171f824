"""Starts of LoRA that look at rows of the run: EVA, CorDA and LoRA-GA.

EVA finds A alone, and B is zero. CorDA and LoRA-GA find both: what they add to the weight is subtracted from it, so
that the model is unchanged at first.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_ms.adapters.methods import lowrank
from lora_ms.adapters.methods.base import Array, SeenRows
from lora_ms.errors import LoraMsError

if TYPE_CHECKING:
    from lora_ms.adapters.methods.lora import LoraConfig, LoraSpec

Tensors = dict[str, dict[str, Array]]  # by module and name
Started = tuple["LoraConfig", Tensors]


def _check_all(init: str, found: Collection[str], names: Collection[str]) -> None:
    left = sorted(set(names) - set(found))
    if left:
        raise LoraMsError(f"init_lora_weights {init} is for projections of layers: {left[0]} is none")


def _by_eva(config: "LoraConfig", seen: SeenRows, specs: Mapping[str, "LoraSpec"]) -> Started:
    most = int(config.eva_rho * config.lora_rank)
    found: dict[str, tuple[Array, Array]] = {}
    for together, taken in seen.inputs():
        adapted = [name for name in together if name in specs]
        if adapted:
            found |= dict.fromkeys(adapted, lowrank.leading_directions(taken, most))
    _check_all("eva", found, specs)
    few = next((name for name, (directions, _) in found.items() if len(directions) < config.lora_rank), None)
    if few is not None:
        raise LoraMsError(
            f"init_lora_weights eva: rank {config.lora_rank} of {few} needs as many tokens: give more rows"
        )
    ranks = dict.fromkeys(found, config.lora_rank)
    if most > config.lora_rank:
        shares = {name: share for name, (_, share) in found.items()}
        ranks = lowrank.ranks_by_share(shares, config.lora_rank * len(found))
    kept = {name: rank for name, rank in ranks.items() if rank}
    other = {name: rank for name, rank in kept.items() if rank != config.lora_rank}
    config = replace(
        config,
        init_lora_weights=True,
        target_modules=tuple(kept) if len(kept) < len(ranks) else config.target_modules,
        rank_pattern=other,
        alpha_pattern={name: config.lora_alpha * rank / config.lora_rank for name, rank in other.items()},
    )
    return config, {name: {"lora_A.weight": found[name][0][:rank]} for name, rank in kept.items()}


def _factors(a: Array, b: Array) -> dict[str, Array]:
    return {"lora_A.weight": a, "lora_B.weight": b}


def _by_corda(config: "LoraConfig", seen: SeenRows, specs: Mapping[str, "LoraSpec"]) -> Started:
    found: Tensors = {}
    for together, taken in seen.inputs():
        adapted = [name for name in together if name in specs]
        if not adapted:
            continue
        second_moment = lowrank.damped_second_moment(taken)
        for name in adapted:
            rank, scaling = specs[name].lora_rank, config.scaling_of(specs[name])
            least = config.corda_method == "kpm"
            found[name] = _factors(*lowrank.oriented_factors(seen.weight(name), second_moment, rank, scaling, least))
    _check_all("corda", found, specs)
    return replace(config, begun=True), found


def _by_gradient(config: "LoraConfig", seen: SeenRows, specs: Mapping[str, "LoraSpec"]) -> Started:
    found: Tensors = {}
    for name, gradient in seen.gradients(specs):
        rank = specs[name].lora_rank
        if 2 * rank > min(gradient.shape):
            raise LoraMsError(
                f"init_lora_weights lora_ga: rank {rank} of {name} is above half of its smaller side, "
                f"{min(gradient.shape)}: lower lora_rank"
            )
        found[name] = _factors(*lowrank.gradient_factors(gradient, rank))
    _check_all("lora_ga", found, specs)
    return replace(config, begun=True), found


Start = Callable[["LoraConfig", SeenRows, Mapping[str, "LoraSpec"]], Started]
STARTS: dict[str, Start] = {"eva": _by_eva, "corda": _by_corda, "lora_ga": _by_gradient}  # by init_lora_weights
