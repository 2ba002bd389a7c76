"""The configurations that come with the package, by name."""

from pathlib import Path

SHIPPED = Path(__file__).parents[1] / "configs"


def names() -> list[str]:
    """Return the names of the shipped configurations: their paths in ``configs/`` without the suffix, folders last."""
    found = [path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def find(name: str) -> Path | None:
    """Return the file of a shipped configuration, or None if there is none of this name.

    Example:
        >>> find("quickstart").name, find("ablations/sdpo.yaml").name, find("configs/lora.yaml").name, find("mine.yaml")
        ('quickstart.yaml', 'sdpo.yaml', 'lora.yaml', None)

    Args:
        name: As `pgpo configs` lists it, or its path in the repository, such as ``configs/lora.yaml``.
    """
    plain = name.removeprefix("configs/").removesuffix(".yaml")
    return SHIPPED / f"{plain}.yaml" if plain in names() else None
