"""The public names are there, and importing them loads nothing that training can do without."""

import subprocess
import sys

import pytest

import pgpo_lightning
import pgpo_lightning.callbacks
import pgpo_lightning.modules

HEAVY = ("tensorboard", "matplotlib", "datasets", "bitsandbytes", "peft", "scipy", "vllm")

NEW_PROCESS = f"""
import sys

def loaded():
    return {{name for name in {HEAVY} if name in sys.modules}}

import pgpo_lightning
assert not loaded() and "torch" not in sys.modules and "lightning" not in sys.modules
import lightning  # whose torchmetrics loads matplotlib and scipy where they are installed
before = loaded()
assert not before & {{"tensorboard", "datasets", "bitsandbytes", "peft", "vllm"}}, before
for name in sys.argv[1:]:
    getattr(pgpo_lightning, name)
    assert loaded() == before, (name, loaded() - before)
import pgpo_lightning.modules.sdpo
assert loaded() == before, loaded() - before
"""


def test_public_names_load_no_heavy_package():
    command = [sys.executable, "-c", NEW_PROCESS, *pgpo_lightning.__all__]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_the_one_of_its_room():
    assert sorted(pgpo_lightning._HOME) == sorted(pgpo_lightning.__all__)
    assert {*pgpo_lightning.callbacks.__all__, *pgpo_lightning.modules.__all__} <= {*pgpo_lightning.__all__}
    assert pgpo_lightning.SDPO is pgpo_lightning.modules.SDPO
    assert {"SDPO", "__version__"} <= {*dir(pgpo_lightning)}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pgpo_lightning' has no attribute 'nothing'"):
        pgpo_lightning.nothing  # noqa: B018
