"""Every path, dotted name and link that the pages and the configurations mention exists."""

import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from pgpo_lightning.modules.moved import MOVED
from tests.support import ROOT
from tests.support.helpers import MODULES

FOLDERS = ("pgpo_lightning", "callbacks", "configs", "docs", "benchmarks", "tests")
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    if "runs" not in path.relative_to(ROOT).parts
)
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# `docs/findings/report.md`, `losses/fused.py`, `scale/24gb-qwen3-0.6b.yaml`, `test_teacher.py`; no URL, no {braces}.
PATH = re.compile(r"(?<![\w./{}~$=-])((?:[\w.+=-]+/)*[\w.+=-]+\.(?:py|yaml|md|jsonl(?:\.xz)?|png|toml))(?![\w/])")
FOLDER = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/(?:[\w-]+/)*)(?![\w.*{{<])")
DOTTED = re.compile(r"(?<![\w./-])((?:pgpo_lightning|benchmarks)(?:\.[A-Za-z_]\w*)+)")
WRITTEN_BY_RUNS = {
    "calibration.md", "config.resumed-at-step=N.yaml", "config.yaml", "gpu.jsonl", "hparams.yaml", "mine.yaml",
    "my.yaml", "estimator.md", "estimator.png", "momentum.md", "momentum.png", "report.jsonl", "report.md", "runs.jsonl",
    "sde.md", "sde.png", "stability.png", "test.jsonl", "train.jsonl",
}  # fmt: skip
OF_OTHERS = {"teacher_sync.py", "trl/experimental/sdpo/sdpo_trainer.py"}  # TRL's


def existing() -> set[str]:
    """Every file of the repository, as its path and as every ending of it that starts at a folder's name."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    parts = [path.relative_to(ROOT).parts for path in files]
    return {"/".join(part[i:]) for part in parts for i in range(len(part))}


FILES = existing()


def texts(path: Path) -> str:
    """The page, without the addresses that it links to."""
    return re.sub(r"https?://\S+", "", path.read_text(encoding="utf-8"))


def resolves(name: str) -> bool:
    """Whether the dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    if parts[0] == "benchmarks":  # some import libraries that only comparisons need
        module = ROOT.joinpath(*parts[:-1]).with_suffix(".py")
        defined = module.exists() and re.search(rf"^(class|def) {parts[-1]}\b", module.read_text("utf-8"), re.MULTILINE)
        return bool(defined) or ROOT.joinpath(*parts).with_suffix(".py").exists() or ROOT.joinpath(*parts).is_dir()
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or " "):
                raise
            continue
        for part in parts[i:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_names_exist(page):
    text = texts(page)
    paths = (
        {path for path in PATH.findall(text) if not path.startswith(("runs/", "questions/"))}
        - WRITTEN_BY_RUNS
        - OF_OTHERS
    )
    assert not sorted(path for path in paths if path not in FILES and not (page.parent / path).exists())
    assert not sorted(folder for folder in set(FOLDER.findall(text)) if not (ROOT / folder).is_dir())
    assert not sorted(name for name in set(DOTTED.findall(text)) if not resolves(name.removesuffix(".py")))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = page if not file else page.parent / file
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_on_the_site():
    """`make docs` builds it; notebooks, and pages of configs/ and benchmarks/, are added by its hooks."""
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.is_relative_to(ROOT / "docs")]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted([*pages, *notebooks, "configs.md", "benchmarks.md"])


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_pages_that_use_our_terms_link_the_glossary(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if page.name != "glossary.md" and re.search(r"\b(dose|arms?|rho|demonstrations?)\b|\bI\b", prose):
        assert "(glossary.md" in prose


@pytest.mark.parametrize(
    "page", [path for path in PAGES if path.parent.name != "benchmarks"], ids=lambda path: path.name
)
def test_settings_stand_in_their_groups(page):
    """`update.micro_batch_tokens` is a field of its group, and the page does not call it `micro_batch_tokens`."""
    groups = {
        name: {field.name for field in fields(parameter.annotation)}
        for module in MODULES
        for name, parameter in inspect.signature(module).parameters.items()
        if is_dataclass(parameter.annotation)
    }
    code = " ".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    named = re.findall(rf"(?<![\w.-])({'|'.join(groups)})\.(?!py\b)(\w+)(?![\w(*])", code)
    assert not sorted(f"{group}.{field}" for group, field in set(named) if field not in groups[group])
    if page.name == "coming_from_trl.md":  # names of others; ours are checked in test_names_of_others.py
        return
    bare = set(re.findall(r"(?<![\w.-])([a-z]\w*)(?![\w.-])", code)) & MOVED.keys()
    assert not bare - {"alpha", "is_clip", "preflight", "shaping", "std", "ties", "tokenizer"}
