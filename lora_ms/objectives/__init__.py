"""Further terms of the loss: the entries of ``objectives`` in a YAML. ``base`` says what a term is."""

from lora_ms.objectives.base import ObjectiveKeys
from lora_ms.objectives.parameter_terms import EwcKeys, L2AnchorKeys, OrthogonalKeys

OBJECTIVES: dict[str, type[ObjectiveKeys]] = {  # by `type`
    "ewc": EwcKeys,
    "l2_anchor": L2AnchorKeys,
    "orthogonal": OrthogonalKeys,
}
