"""A verifier that closes the output of its process."""

import pytest

from tests.support.processes import finish, start


@pytest.mark.parametrize("how", ["sys.stdout.close()", "os.close(1)"])
def test_a_verifier_that_closes_the_output_is_an_error_that_can_be_read(how, tmp_path):
    """In a process of its own, whose output can be closed."""
    code = f"""
import os, sys
from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.rewards.grade import grade
from pgpo_lightning.core.types import Question
def vandal(question, response):
    {how}
    return 1.0
try:
    grade(vandal, Question("What?", "A", index=3), "text")
except VerifierError as error:
    print(error, file=sys.stderr)
file = open({str(tmp_path / "data")!r}, "w")
print("one line", flush=True)
assert file.fileno() != 1
"""
    log = tmp_path / "log"
    (tmp_path / "worker.py").write_text(code)
    process = start([tmp_path / "worker.py"], log)
    finish(process, log=log)
    text = log.read_text()
    assert "Verifier vandal raised RuntimeError on question 3 of an unnamed source ('What?'): it closed" in text
    assert ("one line" in text) == (how == "sys.stdout.close()")
    assert (tmp_path / "data").read_text() == ""
