"""Terms that keep the trained parameters near, or away from, others: ``ewc``, ``l2_anchor`` and ``orthogonal``."""

from pathlib import Path as File
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lora_ms import saving
from lora_ms.errors import LoraMsError
from lora_ms.objectives import fisher_file
from lora_ms.objectives.base import ObjectiveKeys, Start
from lora_ms.text import counted, listed
from lora_ms.values import Number, Text, Texts

if TYPE_CHECKING:
    from mindspore import nn


class EwcKeys(ObjectiveKeys):
    """Elastic weight consolidation (Kirkpatrick et al., 2017): ``lambda Σ F (w - w0)²`` over the trained parameters.

    w0 are the parameters that the run starts from; F is their diagonal Fisher information on general rows. With an
    adapter both are of the adapter's own parameters, not of the weight that they amount to: so it suits every method
    and weights of four bits, and takes the memory of the adapter rather than of the model.
    """

    has_start: ClassVar[bool] = True

    type: Literal["ewc"]
    strength: Number = Field(1000.0, ge=0, alias="lambda")
    fisher: Text  # file that `lora-ms fisher` has written

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"fisher": saving.digest_of(File(self.fisher))}  # wherever the file is

    def check(self) -> None:
        fisher_file.read(File(self.fisher))

    def parameter_term(self, start: Start) -> "nn.Cell":
        from lora_ms.objectives.parameter_cells import PullToStart

        fisher = fisher_file.read(File(self.fisher))
        found = [name for name in start.names if name in fisher.values]
        if not found:
            raise LoraMsError(
                f"{self.fisher}: has none of the parameters that are trained (such as {start.names[0]}): make it with "
                "lora-ms fisher and this configuration"
            )
        odd = [
            f"{name} {list(fisher.values[name].shape)} there, {list(param.shape)} here"
            for name, param in zip(start.names, start.params, strict=True)
            if name in fisher.values and fisher.values[name].shape != tuple(param.shape)
        ]
        if odd:
            raise LoraMsError(f"{self.fisher}: made of another model or adapter: {listed(odd, most=3)}")
        importance = [fisher.of(name) for name in start.names]
        return PullToStart("ewc", start.params, self.weight * self.strength, importance)

    def notes(self, start: Start) -> list[str]:
        fisher = fisher_file.read(File(self.fisher))
        inside = sum(p.size for name, p in zip(start.names, start.params, strict=True) if name in fisher.values)
        total = sum(p.size for p in start.params)
        lines = [f"ewc: {inside:,} of {total:,} trained numbers are held, by {counted(fisher.rows, 'row')}"]
        unused = [name for name in fisher.values if name not in start.names]
        if unused:
            lines.append(f"ewc: {self.fisher} also has {listed(unused, most=3)}: not trained here")
        values = {name: p.asnumpy() for name, p in zip(start.names, start.params, strict=True)}
        held = {name: values[name] for name in fisher.values if name in values}
        if not unused and fisher.start != fisher_file.digest_of_values(held):
            lines.append(f"warning: {self.fisher} was made at other values of the parameters than this run starts from")
        return lines


class L2AnchorKeys(ObjectiveKeys):
    """``Σ (w - w0)²`` over the trained parameters; w0 are those that the run starts from (Li et al., 2018)."""

    has_start: ClassVar[bool] = True

    type: Literal["l2_anchor"]

    def parameter_term(self, start: Start) -> "nn.Cell":
        from lora_ms.objectives.parameter_cells import PullToStart

        return PullToStart("l2_anchor", start.params, self.weight)


class OrthogonalKeys(ObjectiveKeys):
    """O-LoRA (Wang et al., 2023): the sum of the squares of ``A_earlier A^T``, over modules and earlier adapters."""

    type: Literal["orthogonal"]
    weight: Number = Field(0.5, ge=0)
    adapters: Texts = []  # folders of the earlier adapters; `lora-ms sequence` gives them itself

    def identity(self) -> dict[str, Any]:
        digests = [saving.digest_of(File(folder) / "adapter_model.safetensors") for folder in self.adapters]
        return super().identity() | {"adapters": digests}

    def check(self) -> None:
        if not self.adapters:
            raise LoraMsError("objectives: orthogonal needs adapters: give the folders of the earlier ones")
        for folder in self.adapters:
            fisher_file.earlier_factors(File(folder))

    def parameter_term(self, start: Start) -> "nn.Cell":
        from lora_ms.objectives.parameter_cells import Overlap

        earlier = [fisher_file.earlier_factors(File(folder)) for folder in self.adapters]
        term = Overlap.of(start, earlier, self.weight)
        if term is None:
            raise LoraMsError(
                f"objectives: orthogonal: the adapters {listed(self.adapters, most=3)} and the one that is trained "
                "have no A of one module and width in common"
            )
        return term
