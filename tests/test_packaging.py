"""What a user installs is what stands in the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_every_file_and_no_global_callbacks(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "pgpo_lightning"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += (ROOT / "callbacks").glob("*.py")
    expected = set()
    for path in files:
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "callbacks":
            inside = Path("pgpo_lightning") / inside
        expected.add(inside.as_posix())
    assert {"pgpo_lightning/callbacks/multiplier.py", "pgpo_lightning/assets/toy/model.safetensors"} <= expected
    assert names == expected


def test_the_top_level_folder_is_no_package_of_its_own():
    """Imported twice, every class would exist twice, and jsonargparse would not know its own subclasses."""
    result = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Import `pgpo_lightning.callbacks`, not `callbacks`" in result.stderr
