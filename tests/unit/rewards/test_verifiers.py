import math
import os
import signal
import threading
import time
from datetime import date
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.rewards import BoxedAnswer, MultipleChoice, symbolic


def ask(answer, **kwargs):
    return Question("What is it?", answer, index=3, source="train.json:4", **kwargs)


# Examples that were run against the reference grader, gold "A".
REFERENCE = [
    ("A", 1, "A"),
    ("<answer>A", 1, "A"),
    ("<answer>A</answer> and more text", 1, "A"),
    ("<answer>B</answer> no, <answer>A</answer>", 1, "A"),
    ("A</answer> junk", 1, "A"),
    ("<answer>(A)</answer>", 0, "(A)"),
    ("<answer>A.</answer>", 0, "A."),
    ("<answer>a</answer>", 0, "a"),
    ("<answer>A: text</answer>", 0, "A: text"),
    ("<answer>\\boxed{A}</answer>", 0, "\\boxed{A}"),
    ("The answer is A", 0, "The answer is A"),
    ("<answer>\n A \n</answer>", 1, "A"),
    ("<answer>A</answer> or <answer>B</answer>", 0, "B"),
    ("<answer>A</answer> x <answer></answer>", 0, None),
    ("The answer is definitely A", 0, None),  # 26 characters are no vote
    ("", 0, None),
]
STRICT = [
    ("<answer>A</answer>", "A"),
    ("<think>so\n</think>\n<answer>\n A </answer> \n", "A"),
    ("A", None),
    ("<answer>A", None),
    ("<answer>A</answer>.", None),
    ("<answer>B</answer><answer>A</answer>", None),
    ("</answer><answer>A</answer>", None),
    ("<answer>a</answer>", None),
    ("<answer>AB</answer>", None),
    ("<answer>E</answer>", None),
    ("<answer>(A)</answer>", None),
]
LENIENT = [
    ("A", "A"),
    ("(A)", "A"),
    ("<answer>(A)</answer>", "A"),
    ("<answer>A.</answer>", "A"),
    ("<answer>a</answer>", "A"),
    ("<answer>A: noble gas</answer>", "A"),
    ("<answer>\n**C**\n</answer>", "C"),
    ("<answer>\\boxed{A}</answer>", "A"),
    ("so $\\boxed{\\text{A}}$.", "A"),
    ("so \\boxed{ \\mathrm{(B)} }", "B"),
    ("The answer is A", "A"),
    ("The final answer is: (A), because gold is dense.", "A"),
    ("**Answer:** D", "D"),
    ("The answer is A because B is wrong.", "A"),
    ("<answer>B</answer> No: the answer is C.", "C"),
    ("The answer is C. <answer>B</answer>", "B"),
    ("\\boxed{A} ... \\boxed{B}", "B"),
    ("A\nBecause it is.", "A"),
    # Words and lists that only look like an option.
    ("A noble gas.", None),
    ("<answer>a noble gas</answer>", None),
    ("The answer is a gas.", None),
    ("The answer is not A.", None),
    ("The answer is Argon", None),
    ("The answer is A's opposite", None),
    ("The answer is A or B", None),
    ("<answer>A, B</answer>", None),
    ("<answer>(A) and (C)</answer>", None),
    ("\\boxed{AB}", None),
    ("<answer>E</answer>", None),
    ("I like A and C.", None),
    ("", None),
]


class TestMultipleChoice:
    @pytest.mark.parametrize(("response", "reward", "answer"), REFERENCE)
    def test_reference(self, response, reward, answer):
        assert MultipleChoice()(ask("A"), response) == Verdict(float(reward), None, answer)

    @pytest.mark.parametrize(
        ("variant", "response", "answer"),
        [("strict", *case) for case in STRICT] + [("lenient", *case) for case in LENIENT],
    )
    def test_letter(self, variant, response, answer):
        verifier = MultipleChoice(variant)
        for gold in "ABCD":
            assert verifier(ask(gold), response) == Verdict(float(gold == answer), None, answer)

    def test_options(self):
        assert MultipleChoice("lenient", "AB")(ask("B"), "\\boxed{C}").answer is None
        assert MultipleChoice("lenient", "ABCDE")(ask("E"), "\\boxed{E}").reward == 1.0

    @pytest.mark.parametrize("gold", ["C", "a", "", "AB", None, 0])
    def test_gold_not_an_option(self, gold):
        with pytest.raises(ValueError, match=r"train\.json:4 to be in 'AB', but got"):
            MultipleChoice(options="AB")(ask(gold), "A")

    def test_arguments(self):
        with pytest.raises(ValueError, match=r"`variant` to be one of .* but got 'loose'"):
            MultipleChoice("loose")
        for options in ("", "A", "ab", "AAB", "A B"):
            with pytest.raises(ValueError, match="`options`"):
                MultipleChoice(options=options)

    @pytest.mark.parametrize(
        "response", ["answer:" + "\n" * 40000, "<answer>" * 5000, "A" + " " * 40000, "answer is " * 4000]
    )
    def test_degenerate_response_is_read_in_linear_time(self, response):
        start = time.perf_counter()
        for variant in ("reference", "strict", "lenient"):
            MultipleChoice(variant)(ask("A"), response)
        assert time.perf_counter() - start < 1.0


FRACTIONS = """
import re, time
from fractions import Fraction

def LatexExtractionConfig(**_): pass

def parse(text, *_, **__):
    if "9^" in text:
        time.sleep(60)
    return Fraction(*map(int, re.findall(r"[0-9]+", text)))

def verify(gold, answer, **_):
    return gold == answer
"""
"""Takes the place of math-verify, whose import takes most of a second: fractions of whole numbers, and a power without end."""


@pytest.fixture
def process(monkeypatch):
    """A process of its own, which compares fractions."""
    process = symbolic.MathProcess()
    process.code = symbolic.MathProcess.code.replace(
        "from math_verify import LatexExtractionConfig, parse, verify", FRACTIONS
    )
    assert FRACTIONS in process.code
    monkeypatch.setattr(symbolic, "math_process", process)
    yield process
    process.stop()


class TestBoxedAnswer:
    @pytest.mark.parametrize(
        ("gold", "response", "answer"),
        [
            (24, r"It is \boxed{24}", "24"),
            ("24", r"\boxed{48}, no: \boxed{ 24. }", "24"),
            ("24", r"\boxed{24} and then \boxed{4", "24"),  # cut off: the last complete box counts
            ("24", r"\boxed{\boxed{24}}", "24"),
            ("24", r"\boxed {+024.0}", "+024.0"),
            (0.5, r"\boxed{.50}", ".50"),
            ("-1234567", r"\boxed{−1{,}234,567}", "-1234567"),
            ("1234", r"\boxed{\$1\,234}", "1234"),
            (r"\dfrac{1}{2}", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ],
    )
    def test_equal_without_library(self, gold, response, answer, monkeypatch):
        monkeypatch.setattr(symbolic.math_process, "equal", lambda *_: pytest.fail("math-verify was called"))
        assert BoxedAnswer()(ask(gold), response) == Verdict(1.0, None, answer)

    @pytest.mark.parametrize(
        ("gold", "response"),
        [
            ("24", r"\boxed{48}"),
            ("24", r"\boxed{24} and \boxed{48}"),
            ("24", r"\boxed{24.0000001}"),
            ("0.333333", r"\boxed{0.3333333}"),
            ("24", "24"),
            ("24", r"\boxed{}"),
            ("24", r"\boxed{24"),
            ("24", r"\boxed{" + "0" * 199 + "24}"),
            ("2424", r"\boxed{24 24}"),
        ],
    )
    def test_different_without_library(self, gold, response, monkeypatch):
        monkeypatch.setattr(symbolic.math_process, "equal", lambda *_: pytest.fail("math-verify was called"))
        assert BoxedAnswer()(ask(gold), response).reward == 0.0

    @pytest.mark.parametrize(
        ("gold", "answer", "equal"),
        [
            ("0.5", r"\frac{1}{2}", True),
            (r"\frac{1}{2}", "2/4", True),
            (r"\frac{3}{4}", r"\frac{4}{3}", False),
            (r"2\sqrt{3}", r"\sqrt{12}", True),
            (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
            ("x^2+2x+1", "(x+1)^2", True),
            ("x^2+2x+1", "(x-1)^2", False),
            (r"\{1, 2\}", r"\left\{2,1\right\}", True),
            (r"\{1, 2\}", r"\{1, 3\}", False),
            ("24", "x = 24", True),
            ("24", r"24\text{ cm}", True),
            ("24", "48 or 24", False),
            ("24", "24, 48", False),
            ("24", "12 12", False),  # math-verify alone says 24
            ("24", "1, 24", False),
            ("24", "3 4 + * 24", False),
            ("[0,1)", "[0,1]", False),
            (r"\frac{\pi}{2}", r"\pi/2", True),
            (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
            (r"\text{Monday}", r"\text{Tuesday}", False),
            ("1024", "2^{10}", True),
        ],
    )
    def test_library(self, gold, answer, equal):
        assert BoxedAnswer()(ask(gold), rf"So \boxed{{{answer}}}.").reward == float(equal)

    @pytest.mark.parametrize(
        "answer", ["9^{9^{9^9}}", "3 4 + * 9^9^9^9", "{" * 20 + "1" + "}" * 20, r"\binom{1000000}{500000}"]
    )
    def test_garbage_cannot_hang(self, answer):
        assert BoxedAnswer()(ask("23"), r"\boxed{\frac{46}{2}}").reward == 1.0  # the process has started
        start = time.perf_counter()
        assert BoxedAnswer(timeout=0.3)(ask("24"), rf"\boxed{{{answer}}}").reward == 0.0
        assert time.perf_counter() - start < 5.0  # unbounded it takes minutes
        # The killed process is replaced.
        assert BoxedAnswer()(ask("24"), rf"\boxed{{\frac{{48}}{{2}}}} {answer}").reward == 1.0

    def test_many_open_boxes_are_linear(self):
        start = time.perf_counter()
        assert BoxedAnswer()(ask("24"), r"\boxed{" * 5000).reward == 0.0
        assert time.perf_counter() - start < 1.0

    def test_threads(self):
        cases = [(f"\\frac{{{i}}}{{7}}", f"{2 * i}/{14 + i % 2}", i % 2 == 0) for i in range(1, 13)]
        rewards = {}

        def work(case):
            rewards[case] = BoxedAnswer()(ask(case[0]), rf"\boxed{{{case[1]}}}").reward

        threads = [threading.Thread(target=work, args=(case,)) for case in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rewards == {case: float(case[2]) for case in cases}

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_a_process_that_dies_is_an_error_and_replaced(self, number, process):
        assert process.equal("3/2", "6/4", 3.0)
        killing = threading.Timer(0.3, os.kill, (process.process.pid, number))
        killing.start()  # as the kernel does when it is short of memory
        with pytest.raises(
            RuntimeError, match=rf"compare '9\^.*' with '3/4', but its process was killed by {number.name}"
        ):
            BoxedAnswer(timeout=60)(ask("3/4"), r"\boxed{9^{9^{9^9}}}")
        killing.join()
        assert BoxedAnswer()(ask("3/4"), r"\boxed{6/8}").reward == 1.0

    def test_a_process_that_died_between_two_answers_is_replaced(self, process):
        assert process.equal("3/2", "6/4", 3.0)
        process.process.kill()
        process.process.wait()
        assert process.equal("3/5", "6/10", 3.0)

    def test_a_missing_module_is_an_error(self, monkeypatch, tmp_path, capfd):
        """math-verify takes the error for a difference: nothing would be right."""
        (tmp_path / "antlr4").mkdir()
        (tmp_path / "antlr4" / "__init__.py").write_text("raise ImportError('no antlr4 here')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        process = symbolic.MathProcess()
        with pytest.raises(RuntimeError, match=r"math-verify to start .* ended with exit status 1"):
            process.equal("3/2", "6/4", 3.0)
        assert "no antlr4 here" in capfd.readouterr().err
        process.code = (
            "print('ready', flush=True); input(); print('true')"  # whatever is wrong, the next call starts anew
        )
        assert process.equal("3/2", "6/4", 3.0)
        process.stop()

    def test_an_answer_that_takes_all_memory_is_wrong(self):
        code = symbolic.MathProcess.code.replace(
            "(2**32,", "(4096 * int(open('/proc/self/statm').read().split()[0]) + 2**25,"
        )
        assert "statm" in code
        process = symbolic.MathProcess()
        process.code = code
        assert process.equal("3/2", "6/4", 3.0)
        before = process.process.pid
        assert not process.equal("24", "2^{2^{30}}", 60.0)
        assert process.equal("3/2", "6/4", 3.0)
        assert process.process.pid == before, "it has replied, not died"
        process.stop()

    def test_interrupt_leaves_no_reply_behind(self, monkeypatch, process):
        assert process.equal("3/2", "6/4", 3.0)

        class Interrupted:
            def readline(self):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(process.process, "stdout", Interrupted())
            patch.setattr(process.process, "communicate", process.process.wait)
            with pytest.raises(KeyboardInterrupt):
                process.equal("3/2", "6/4", 3.0)
        assert not process.equal("3/2", "5/4", 3.0)

    def test_fork_has_its_own_process(self, process):
        assert process.equal("3/2", "6/4", 3.0)
        before = process.process.pid
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"%d %d" % (process.equal("5/2", "10/4", 3.0), process.process.pid != before))
            process.stop()
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 9) == b"1 1"
        assert process.equal("7/2", "14/4", 3.0)
        assert process.process.pid == before

    @pytest.mark.parametrize(
        ("response", "feedback"),
        [
            ("24 or so", r"No final answer in \boxed{} was found."),
            (r"\boxed{48}", "The final answer 48 is wrong."),
            (r"\boxed{" + "1+" * 30 + "1}", "The final answer is longer than 50 characters."),
        ],
    )
    def test_feedback(self, response, feedback):
        verifier = BoxedAnswer(feedback=True, max_chars=50)
        # The same text whatever the gold answer is: nothing of it leaks.
        assert {verifier(ask(gold), response).feedback for gold in ("24", "480", "31")} == {feedback}
        assert BoxedAnswer(max_chars=50)(ask("24"), response).feedback is None
        assert verifier(ask("24"), r"\boxed{24}").feedback is None

    def test_max_chars_is_inclusive(self):
        assert BoxedAnswer(max_chars=4)(ask("24"), r"\boxed{0024}") == Verdict(1.0, None, "0024")
        assert BoxedAnswer(max_chars=3)(ask("24"), r"\boxed{0024}") == Verdict(0.0, None, None)

    @pytest.mark.parametrize(
        "gold",
        [None, "", "  ", "$.$", math.nan, math.inf, Decimal("NaN"), True, ["24"], {"value": 24}, 24j, b"24", date(2024, 1, 1)],
    )  # fmt: skip
    def test_no_gold(self, gold):
        for call in (lambda verifier: verifier.check_question(ask(gold)), lambda verifier: verifier(ask(gold), "24")):
            with pytest.raises(
                ValueError, match=r"train\.json:4 to have a gold answer, a text or a finite number, but got \w"
            ):
                call(BoxedAnswer())

    @pytest.mark.parametrize(
        ("gold", "answer"),
        [
            (1e-07, "0.0000001"),
            (1e22, "1" + "0" * 22),
            (Decimal("1E+3"), "1000"),
            (Decimal("2.50"), "2.5"),
            (Fraction(1, 2), r"\frac{1}{2}"),
            (np.float32(0.5), "0.5"),
            (10**150, "1" + "0" * 150),
        ],
    )
    def test_gold_numbers_are_plain_decimals(self, gold, answer):
        assert BoxedAnswer()(ask(gold), rf"\boxed{{{answer}}}").reward == 1.0
        assert BoxedAnswer()(ask(gold), rf"\boxed{{-{answer}}}").reward == 0.0

    @pytest.mark.parametrize(
        "argument",
        [{"max_chars": 0}, {"max_chars": 10.0}, {"timeout": 0.0}, {"timeout": math.nan}, {"timeout": math.inf},
         {"timeout": 1e12}],
    )  # fmt: skip
    def test_arguments(self, argument):
        with pytest.raises(ValueError, match=f"`{next(iter(argument))}` (to be|to lie in) .*, but got"):
            BoxedAnswer(**argument)
