"""From what is typed on a command line to experts and compositions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_diffusion.bases.names import assets_dir
from mole_diffusion.commands.methods import choose
from mole_diffusion.errors import InvalidRequest

if TYPE_CHECKING:
    from mole_diffusion.bases.base import Base
    from mole_diffusion.composition import Composition
    from mole_diffusion.experts import Expert


def experts_dir() -> Path:
    """Folder of the experts that ship with the project."""
    return assets_dir() / "demo" / "experts"


def expert_path(name: str) -> Path:
    """A file that was named by its path, or an expert that ships, named by its name."""
    path = Path(name)
    if path.suffix == ".safetensors" or path.is_file():
        if path.is_file():
            return path
        raise InvalidRequest(f"Expected a LoRA file at {path}, found none.")
    shipped = {file.stem: file for file in sorted(experts_dir().glob("*.safetensors"))}
    if name not in shipped:
        known = ", ".join(shipped) or "none"
        raise InvalidRequest(f"Expected the path of a LoRA file or a shipped expert ({known}), got {name!r}.")
    return shipped[name]


def load_experts(names: Sequence[str], base: Base) -> list[Expert]:
    """The named experts, checked against the base. Raises BaseMismatch where one does not fit."""
    from mole_diffusion.experts import Expert, check_fits

    shapes = base.module_shapes()
    experts = [Expert.load(expert_path(name), shapes=shapes) for name in names]
    for expert in experts:
        check_fits(expert, base)
    return experts


def shipped_composition(experts: Sequence[Expert]) -> Path | None:
    """The trained composition that ships for exactly these experts, in any order."""
    wanted = {expert.name for expert in experts}
    for file in sorted((assets_dir() / "demo" / "compositions").glob("*.safetensors")):
        if set(file.stem.split("+")) == wanted:
            return file
    return None


def compose_experts(
    pipe: Any, base: Base, experts: Sequence[Expert], *, file: Path | None
) -> tuple[Composition | None, str]:
    """The composition that belongs to these experts where no method is asked for, and how it is called.

    A file is what it is. Otherwise a single expert is applied in full, several use their shipped composition, and where
    there is none, trigger spans.
    """
    if file is not None:
        return _saved(pipe, base, experts, file), f"composition {file.name}"
    if not experts:
        return None, "base alone"
    shipped = shipped_composition(experts) if len(experts) > 1 and base.name == "demo" else None
    if shipped is not None and _made_from(shipped, experts):
        return _saved(pipe, base, experts, shipped), f"composition {shipped.name}"
    from mole_diffusion.composition import compose

    method = "sum" if len(experts) == 1 else "spans"
    return compose(pipe, experts, gate=choose(experts, method)[1], base=base), method


def _made_from(file: Path, experts: Sequence[Expert]) -> bool:
    """Whether a shipped composition was trained with these very files."""
    from mole_diffusion.persist import read_composition_header

    recorded = {entry["sha256"] for entry in read_composition_header(file)["experts"]}
    return recorded == {expert.sha256 for expert in experts}


def _saved(pipe: Any, base: Base, experts: Sequence[Expert], file: Path) -> Composition:
    from mole_diffusion.persist import load_composition

    known: Any = {expert.sha256: expert for expert in experts} if experts else experts_dir()
    return load_composition(file, pipe, known, base)
