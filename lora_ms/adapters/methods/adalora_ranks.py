"""AdaLoRA (Zhang et al., 2023): ranks shared out by importance while an adapter trains, and plain LoRA made of it.

A triplet is one rank of one module: a row of A, a column of B, and their number in E.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from numpy.typing import NDArray

from lora_ms import storage
from lora_ms.adapters.config import AdaLoraConfig, LoraConfig
from lora_ms.adapters.inject import lora_layers
from lora_ms.adapters.matching import Place
from lora_ms.adapters.methods.adalora_cells import Cut, Importance, Orthogonality, Span, joined
from lora_ms.adapters.methods.lora_cells import AdaLoRADense
from lora_ms.adapters.peft_config import Adapted, to_peft
from lora_ms.adapters.peft_format import CONFIG, PREFIX, WEIGHTS, adapted, adapter_tensors
from lora_ms.errors import LoraMsError

Mask = NDArray[np.bool_]
Array = NDArray[np.float32]


def scheduled(config: AdaLoraConfig, total_steps: int, tinit: int | None, tfinal: int | None) -> AdaLoraConfig:
    """``config`` for a run of ``total_steps``: a tenth of it before ranks fall and three tenths after, unless given.

    Raises:
        LoraMsError: the run has no step in which ranks could fall.
    """
    first = total_steps // 10 if tinit is None else tinit
    last = max(1, round(0.3 * total_steps)) if tfinal is None else tfinal
    if first + last >= total_steps:
        raise LoraMsError(f"tinit {first} and tfinal {last} leave no step of {total_steps} for ranks to fall in")
    return replace(config, total_steps=total_steps, tinit=first, tfinal=last)


def last_cut(config: AdaLoraConfig) -> int:
    """The step (from 0) after which ranks are fixed."""
    return config.total_steps - max(config.tfinal, 1)


def budget(config: AdaLoraConfig, modules: int, step: int) -> int:
    """Triplets that are left after optimiser step ``step`` (from 0): falls from all to the target, as a cube."""
    start, target = modules * config.lora_rank, modules * config.target_rank
    if step <= config.tinit:
        return start
    if step >= last_cut(config):
        return target
    left = 1 - (step - config.tinit) / (last_cut(config) - config.tinit)
    return int((start - target) * left**3 + target)


def is_cut(config: AdaLoraConfig, step: int) -> bool:
    """Whether ranks are shared out anew after step ``step``; in the last of these steps always."""
    last = last_cut(config)
    return step == last or (config.tinit < step < last and step % config.delta_t == 0)


def triplet_scores(a: Array, b: Array, e: Array) -> Array:
    """Scores [rank] of triplets from those of the numbers in A [rank, in], B [out, rank] and E [rank, 1]."""
    return e[:, 0] + (a.mean(1) + b.mean(0))


def best(scores: Array, number: int) -> Mask:
    """Which of ``scores`` are the ``number`` highest; of equal ones the first."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:number]] = True
    return kept


class RankAllocator:
    """Shares the ranks of the AdaLoRA layers of ``model`` out while it trains (a ``StepHook`` of the run).

    An adapter whose ranks were shared out before, so that ``config.kept`` names them, keeps those.
    """

    def __init__(self, model: nn.Cell, config: AdaLoraConfig):
        self.model, self.plan = model, config
        self.layers = {name: c for name, c in lora_layers(model).items() if isinstance(c, AdaLoRADense)}
        self.ends = list(accumulate(cell.lora_rank for cell in self.layers.values()))
        self.spans: list[tuple[Span, Span, Span]] = []  # of A, B and E in the optimiser's vectors

    def objectives(self, params: Sequence[Parameter]) -> list[Orthogonality]:
        """How far A and B are from orthogonal.

        Raises:
            LoraMsError: a factor is frozen.
        """
        starts = accumulate((p.size for p in params), initial=0)
        where = {id(p): Span(start, tuple(p.shape)) for p, start in zip(params, starts, strict=False)}
        for name, cell in self.layers.items():
            factors = (cell.lora_a, cell.lora_b, cell.lora_e)
            if not all(id(factor) in where for factor in factors):
                raise LoraMsError(f"AdaLoRA trains A, B and E of every module, and {name} is frozen in part")
            a, b, e = (where[id(factor)] for factor in factors)
            self.spans.append((a, b, e))
        if not self.plan.orth_reg_weight:
            return []
        rows, columns, _ = zip(*self.spans, strict=True)
        return [Orthogonality(rows, columns, sum(p.size for p in params), self.plan.orth_reg_weight)]

    def observer(self, params: Sequence[Parameter]) -> Importance:
        """How important every number is; after ``objectives``."""
        config = self.plan
        stretches = joined([span for spans in self.spans for span in spans])
        self.importance = Importance(stretches, self.ends[-1], config.beta1, config.beta2)
        if config.kept:
            self.importance.kept.set_data(Tensor(self._flat(config.kept)))
        self.cut = Cut([cell.lora_e for cell in self.layers.values()], self.importance.kept)
        return self.importance

    def after_step(self, step: int) -> None:
        """Cuts where the schedule says so; waits for the step then."""
        if self.plan.kept:
            self.cut()
            return
        last = last_cut(self.plan)
        if is_cut(self.plan, step):
            kept = best(self.scores(), budget(self.plan, len(self.layers), step))
            self.importance.kept.set_data(Tensor(kept.astype(np.float32)))
        if is_cut(self.plan, step) or step > last:
            self.cut()
        if step == last - 1:
            self.importance.measuring.set_data(Tensor(0.0, ms.float32))

    def scores(self) -> Array:
        """Of every triplet, module by module."""
        wide = np.zeros(max(span.stop for spans in self.spans for span in spans), np.float32)
        score = self.importance.importance.asnumpy() * self.importance.spread.asnumpy()
        start = 0
        for first, last in self.importance.stretches:
            wide[first:last] = score[start : start + last - first]
            start += last - first
        return np.concatenate([triplet_scores(*(span.of(wide) for span in spans)) for spans in self.spans])

    def _flat(self, kept: Mapping[str, tuple[bool, ...]]) -> Array:
        full = {name: kept.get(name, (True,) * cell.lora_rank) for name, cell in self.layers.items()}
        return np.concatenate([np.array(mask, np.float32) for mask in full.values()])

    def kept(self) -> dict[str, Mask]:
        """By path, which triplets are left."""
        masks = np.split(self.importance.kept.asnumpy() > 0, self.ends[:-1])
        return dict(zip(self.layers, masks, strict=True))

    def config(self) -> AdaLoraConfig:
        """The settings with what is kept: nothing is left out before E is zero wherever it would be."""
        kept = self.kept()
        idle = all(not self.layers[name].lora_e.asnumpy()[~mask].any() for name, mask in kept.items())
        if not idle or all(mask.all() for mask in kept.values()):
            return replace(self.plan, kept={})
        return replace(self.plan, kept={name: tuple(mask.tolist()) for name, mask in kept.items()})

    def describe(self) -> str:
        """What will become of the ranks, in one line."""
        c = self.plan
        if c.kept:
            return "AdaLoRA: the ranks stay as they were shared out before"
        return (
            f"AdaLoRA: rank {c.lora_rank} falls to {c.target_rank} on average from step {c.tinit + 2} on (tinit "
            f"{c.tinit}) to step {last_cut(c) + 1} (tfinal {c.tfinal}) of {c.total_steps}, every {c.delta_t} steps"
        )

    def summary(self) -> str:
        """What became of the ranks, in one line."""
        ranks = [int(mask.sum()) for mask in self.kept().values()]
        return f"ranks: {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.2f} on average, {sum(ranks)} in all"


def plain_lora(model: nn.Cell, config: AdaLoraConfig) -> tuple[LoraConfig, Adapted, dict[str, Array]]:
    """Plain LoRA that computes what the AdaLoRA adapter in ``model`` computes, of the ranks in ``config.kept``.

    E goes into A; alpha falls with the rank, so that all modules are scaled alike. A module without a rank left is
    plain. Returns settings, what stands where, and tensors under PEFT's names.
    """
    tensors, places = adapter_tensors(model, config), {}
    guard = config.lora_rank / (config.lora_rank + 1e-5)  # in AdaLoRA's own scaling
    for name, cell in lora_layers(model).items():
        if not isinstance(cell, AdaLoRADense):
            continue
        a, b, e = (tensors.pop(f"{PREFIX}{name}.{factor}") for factor in ("lora_A", "lora_B", "lora_E"))
        if len(a):
            places[name] = Place(len(a), config.lora_alpha * len(a) / config.lora_rank)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a * e * np.float32(guard)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b)
    found = adapted(model)
    left_out = tuple(name for name in found.places if name not in places)
    plain = LoraConfig(config.target_rank, config.lora_alpha, config.lora_dropout, bias=config.bias)
    return plain, Adapted(places, found.saved, (*found.plain, *left_out)), tensors


def save_plain_lora(model: nn.Cell, path: Path, config: AdaLoraConfig, base_model: str | None) -> None:
    """Writes ``plain_lora`` into directory ``path`` in PEFT's format."""
    plain, found, tensors = plain_lora(model, config)
    storage.write_tensors(path / WEIGHTS, tensors)
    storage.write_json(path / CONFIG, to_peft(plain, found, base_model))
