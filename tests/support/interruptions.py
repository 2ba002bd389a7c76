"""A module `parts` for the command line, whose engine and callback ask the process to end."""

import os

import pytest

PARTS = '''
import os, signal
import lightning as L
from pgpo_lightning.rollout.transformers_engine import TransformersEngine

class Engine(TransformersEngine):
    """Asks the process to end when it has sampled for the nth time; of the steps of a run, that many evaluations included."""

    def __init__(self, nth: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.nth, self.rank, self.calls = nth, rank, 0

    def generate(self, *args):
        made = super().generate(*args)
        self.calls += 1
        if self.calls == self.nth and int(os.environ.get("RANK", "0")) == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not self.nth, "the signal was to end this"
        return made

class Ask(L.Callback):
    """Asks the process to end within a hook."""

    def __init__(self, hook: str, step: int, number: int = 15) -> None:
        self.hook, self.step, self.number = hook, step, number

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("hook"):
            return self.ask
        return super().__getattribute__(name)

    def ask(self, trainer, module, *_, **__):
        if module.steps == self.step:
            os.kill(os.getpid(), self.number)
'''


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    yield
    __import__("sys").modules.pop("parts", None)


def checkpoints(folder):
    return sorted(int(path.stem.removeprefix("step=")) for path in (folder / "checkpoints").glob("step=*.ckpt"))


def sampling(nth):
    return ["--model.engine=parts.Engine", f"--model.engine.nth={nth}"]
