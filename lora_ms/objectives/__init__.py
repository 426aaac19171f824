"""Further terms of the loss: the entries of ``objectives`` in a YAML. ``base`` says what a term is."""

from lora_ms.objectives.base import ObjectiveKeys
from lora_ms.objectives.parameter_terms import EwcKeys, L2AnchorKeys, OrthogonalKeys
from lora_ms.objectives.preference_terms import DpoKeys, KtoKeys, OrpoKeys, SimpoKeys
from lora_ms.objectives.row_terms import ContrastiveKeys, KlAnchorKeys

OBJECTIVES: dict[str, type[ObjectiveKeys]] = {  # by `type`
    "ewc": EwcKeys,
    "contrastive": ContrastiveKeys,
    "l2_anchor": L2AnchorKeys,
    "kl_anchor": KlAnchorKeys,
    "orthogonal": OrthogonalKeys,
    "dpo": DpoKeys,
    "orpo": OrpoKeys,
    "simpo": SimpoKeys,
    "kto": KtoKeys,
}
