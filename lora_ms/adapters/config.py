"""What an adapter is, apart from its numbers."""

from dataclasses import dataclass

from lora_ms.errors import LoraMsError

# MindFormers' leaf names of the projections, accepted in target_modules
ALIASES = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}

# adapter_config.json keys that change numbers and are not computed yet, with the value under which they do not
UNSUPPORTED = {
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
}

# of these, the ones that every PEFT of the last years knows; an older one refuses a key that it does not know
WRITTEN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "fan_in_fan_out")


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter.

    Args:
        lora_rank: rank of the update; at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: in [0, 1), on the adapter's input, in training.
        target_modules: a regular expression (matched from the start of the leaf name or of its MindFormers alias,
            or wholly with the dotted path), a list of path suffixes as in PEFT, or ``"all-linear"``.
        exclude_layers: path suffixes or sub-strings of modules to leave out.
    """

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "q_proj|k_proj|v_proj|o_proj"
    exclude_layers: tuple[str, ...] = ()

    def __post_init__(self):
        if self.lora_rank < 1:
            raise LoraMsError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if self.lora_alpha <= 0:
            raise LoraMsError(f"lora_alpha must be above 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            raise LoraMsError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.exclude_layers, str):
            object.__setattr__(self, "exclude_layers", (self.exclude_layers,))

    def identity(self) -> dict[str, float]:
        """What a resumed run must share besides the adapter's tensors."""
        return {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}

    def to_peft(self, adapted: list[str], plain: list[str], base_model: str | None) -> dict:
        """adapter_config.json of an adapter on the layers ``adapted``, beside the ``plain`` ones (dotted paths).

        ``target_modules`` are leaf names, or whole paths where a leaf name would take a plain layer in.
        """
        leaves = {name.rsplit(".", 1)[-1] for name in adapted}
        exact = any(name.rsplit(".", 1)[-1] in leaves for name in plain)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": sorted(adapted if exact else leaves),
            "exclude_modules": None,
            "layers_to_transform": None,
            "init_lora_weights": True,
            **{key: UNSUPPORTED[key] for key in WRITTEN},
        }

    @classmethod
    def from_peft(cls, config: dict, where: str) -> "LoraConfig":
        """Of a parsed adapter_config.json.

        Raises:
            LoraMsError: another peft_type, or keys that ask for what is not computed here; all are listed.
        """
        if config.get("peft_type") != "LORA":
            raise LoraMsError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
        faults = [
            f"{key}: {config[key]}"
            for key, plain in UNSUPPORTED.items()
            if config.get(key) not in (plain, None, [], {})
        ]
        if faults:
            raise LoraMsError(f"{where}: not supported yet: {', '.join(faults)}")
        missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
        if missing:
            raise LoraMsError(f"{where}: {', '.join(missing)} is missing")
        return cls(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config["target_modules"])
