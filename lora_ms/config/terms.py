"""``objectives``: a list of mappings, each with the ``type`` of a term of the loss and that term's own keys."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lora_ms.objectives import OBJECTIVES
from lora_ms.objectives.base import ObjectiveKeys

if TYPE_CHECKING:
    Term = ObjectiveKeys
else:
    Term = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="type")]
