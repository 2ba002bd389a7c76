"""Configurations that loop, fill the memory or lose a key are refused, naming the file."""

import json

import pytest

from pgpo_lightning.commands.config_files import LARGEST
from pgpo_lightning.commands.main import main

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "stand for at most 100,000 values"),
        ("a: &a {b: *a}\n", "to end, but the alias at line 1 contains itself"),
        ("seed_everything: 1\ntrainer: {max_steps: 2, max_steps: 3}\n", "`max_steps` at line 2 is there twice"),
        ("#" * (LARGEST + 1), "at most 1,048,576 bytes"),
        (b"\xff\xfe\x00", "text in UTF-8"),
        ("a: [1\n", "to be YAML"),
        ("[" * 5000, "nested without end|to be YAML"),
    ],
    ids=["laughs", "recursive", "twice", "large", "binary", "broken", "nested"],
)
@pytest.mark.parametrize("command", ["fit", "ablate"])
def test_a_configuration_without_end_is_refused(tmp_path, command, content, message):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        main([command, "--config", str(path)])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_what_is_no_file_is_not_read(path):
    with pytest.raises(ValueError, match=f"but {path} is not a file"):
        main(["fit", f"--config={path}"])


def test_aliases_and_merges_are_fine(tmp_path):
    path = tmp_path / "fine.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a, x: 3}\n")
    from pgpo_lightning.commands.config_files import check_config_files

    check_config_files(["fit", "--config", str(path)])


def test_settings_longer_than_a_file_name_are_no_file():
    from pgpo_lightning.commands.config_files import check_config_files

    check_config_files(["fit", "--config", json.dumps({"trainer": {"max_steps": 1}, "data": "x" * 300})])
