"""Files that come with the package: the YAMLs of ``configs`` and the launcher of several processes."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# an installed package has them beside its modules, the repository beside the package
ROOT = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent


def bundled(name: str) -> Path | None:
    """The bundled file ``configs/FAMILY/X.yaml``, ``scripts/X.sh`` or ``run_mindformer.py``; None for other names."""
    place = ROOT / name
    known = name == "run_mindformer.py" or (name.startswith(("configs/", "scripts/")) and ".." not in name)
    return place if known and place.is_file() else None
