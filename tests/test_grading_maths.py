"""Maths grading: what counts as the same answer, what does not, where the answer is found, how votes are counted."""

import pytest

from pipelines.grading import algebra
from pipelines.grading.maths import equal, split_top
from s2t_models.answers.final_answer import boxed, final_answer
from s2t_models.answers.numbers import number
from s2t_models.answers.voting import vote, vote_key

SAME = [
    # numbers
    ("5", "5.0"), ("5", "05"), ("25", "025"), ("0.5", ".5"), ("7", "seven"), ("-1", "x=-1"), ("4", "4."),
    ("1000", "1,000"), ("1000", "1{,}000"), (r"10,\!080", "10080"), ("61,328", "61, 328"), ("120,240", "240,120"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"), ("10^{4}", "10000"), (r"1.5\times 10^{3}", "1500"), ("2^{10}", "1024"),
    # fractions and decimals
    (r"\frac{1}{2}", "1/2"), (r"\frac12", r"\dfrac{1}{2}"), ("0.5", r"\frac{1}{2}"), (r"3\frac{1}{2}", "3.5"),
    ("3 1/2", r"\frac{7}{2}"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"\frac{-1}{2}", "-0.5"), (r"\frac{4}{3}", r"1\frac13"),
    (r"\frac{1}{3}", "0.3333"), ("0.3333", r"\frac{1}{3}"), (r"12\pi", "37.699"), ("50%", "0.5"), (r"\frac{3}{4}", r"75\%"),
    # units, currency, degrees, text
    ("18", r"\$18"), ("18", "$18"), ("18", "18 dollars"), ("18", r"18\text{ dollars}"), ("18", "18 dollars per day"),
    (r"15\mbox{ cm}^2", "15"), (r"864 \mbox{ inches}^2", "864"), (r"5.4 \text{ cents}", "5.4"), ("90", r"90^\circ"),
    ("90", r"90^{\circ}"), ("90", "90°"), ("90", "90 degrees"), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"\text{east}", "east"), (r"\text{Evelyn}", "Evelyn"), ("even", r"\textbf{even}"), (r"\text{(C)}", "C"), ("C", "(C)"),
    # equations and names
    ("x=5", "5"), ("5", "x = 5"), ("5", "x = 2 + 3 = 5"), ("y = 2x + 3", "2x+3"), ("2x+3", "y=3+2x"), ("f(x)=x+1", "x+1"),
    ("5x-7y+11z+4=0", "5x - 7y + 11z = -4"), (r"\angle BEA_{1}=90", "90"),
    # points, intervals, lists, sets, matrices
    ("(1,2)", r"\left(1, 2\right)"), (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"), ("(3,4]", r"\left( 3, 4 \right]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,2)"), (r"x \in [-2,7]", "[-2,7]"), ("x>-3", r"(-3,\infty)"),
    ("1,-2", "-2, 1"), ("3, 5, 7", "7,5,3"), (r"\{1,2\}", r"\{2,1\}"), ("1,2", r"\{1,2\}"), ("1,2", "1 and 2"),
    ("1,2", "x=1 or x=2"), ("1,2", r"1 \text{ and } 2"), (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1+\sqrt5, 1-\sqrt{5}"), ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{bmatrix}"),
    # algebra
    ("x^2+2x+1", "(x+1)^2"), ("6-5i", "-5i+6"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("p-q", "-q+p"), (r"1-\frac{1}{\mathrm{e}}", "1-e^{-1}"), (r"\sqrt[3]{2}", "2^{1/3}"), (r"\binom{5}{2}", "10"),
    (r"2\sqrt{3}", "2√3"), (r"\pi", "π"),
    # numerals in a base
    ("52_8", "52_{8}"), ("4210_{5}", "4210_5"),
]  # fmt: skip
DIFFERENT = [
    # known false positives of math-verify
    (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}"), ("11_2", "11"), ("11", "11_2"), ("10", r"10\%"), (r"10\%", "10"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"), (r"(-\infty,2)", r"(-\infty,2]"), ("52_8", "52_9"),
    # numbers
    ("5", "6"), ("5", "-5"), ("5", ""), ("5", " "), ("12345", "12346"), ("2039191", "2039192"), ("33", "33.33"),
    (r"\frac13", "0.3"), (r"\frac12", "2"), ("0", "0.0001"), (r"12\pi", "38"), (r"2\pi", "2"), ("2 pi", "2"), ("1000", "1,00"),
    ("12", "1,2"), ("1,2", "12"), ("1,234", "234"), ("10^{4}", "10^{5}"), ("4", "4!"), ("3", "three hundred"),
    # lists, points, sets
    ("1,2", "1,3"), ("1,2", "1"), ("1", "1,2"), ("1,2,2", "1,1,2"), ("(1,2,3)", "(1,2)"), (r"\{1,2\}", r"\{1,2,3\}"),
    ("(1,2)", "(1,2),(3,4)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    # algebra and words
    ("x+1", "x-1"), ("p-q", "q-p"), ("3+4i", "3-4i"), ("x^2", "x^3"), (r"\frac{a}{b}", r"\frac{b}{a}"), ("2k", "2"),
    (r"\frac{1}{2}x", r"\frac{1}{2}"), ("y=2x+3", "y=2x-3"), ("x<5", r"x \le 5"), ("east", "west"), ("A", "B"), (r"\text{yes}", "no"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "pred"), SAME)
def test_same(gold: str, pred: str) -> None:
    assert equal(gold, pred)


@pytest.mark.parametrize(("gold", "pred"), DIFFERENT)
def test_different(gold: str, pred: str) -> None:
    assert not equal(gold, pred)


def test_a_question_for_a_percentage_makes_the_sign_a_unit() -> None:
    assert equal("10", r"10\%", percent_asked=True)
    assert equal(r"10\%", "10", percent_asked=True)
    assert not equal("10", r"11\%", percent_asked=True)


def test_tolerance_is_absolute_and_reaches_expressions() -> None:
    assert equal("4.2", "4.29", tolerance=0.1)
    assert not equal("4.2", "4.31", tolerance=0.1)
    assert equal(r"\sqrt{2}", "1.5", tolerance=0.1)
    assert not equal(r"\sqrt{2}", "1.6", tolerance=0.1)


def test_exact_numbers() -> None:
    assert number("1e5") == number(r"1\times10^{5}") == 100000
    assert number("1e999999999") is None
    assert number(r"\frac{1}{0}") is None
    assert str(number("-2 1/3")) == "-7/3"
    assert split_top("(1,2),[3,4)") == ["(1,2)", "[3,4)"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So $x=\\boxed{5}$, no: \\boxed{\\frac{1}{2}}.", r"\frac{1}{2}"),
        ("The set is \\boxed{\\{1,2\\}}.", r"\{1,2\}"),
        ("\\boxed{\\text{nested } \\{ a_{1} \\}}", r"\text{nested } \{ a_{1} \}"),
        ("It is \\boxed 7$ .", "7"),
        ("cut off: \\boxed{12 + 3", "12 + 3"),
        ("16 - 3 = <<16-3=13>>13\n#### 1,300", "1,300"),
        ("The answer is 18. She keeps 3.", "18"),
        ("The final answer is: $\\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
        ("**Answer:** 42", "42"),
        ("The answer is 18 dollars because she sells 9 eggs for 2 dollars.", "18 dollars"),
        ("She makes 9 * 2 = $1,018.50 every day.", "1018.50"),
        ("That leaves -3 in all", "-3"),
        ("I do not know.", None),
        ("", None),
        ("\\boxed{}", None),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


def test_boxed_without_a_box() -> None:
    assert boxed("no box, not even a boxed lunch") is None


def test_a_stuck_worker_is_killed_and_replaced() -> None:
    pool = algebra.Algebra(workers=1, cpu_seconds=1.0)
    try:
        assert pool.equal("x+1", "1+x")
        assert not pool.equal("3", "2^{3^{3^{3^{3}}}} - 7^{9^{9^{9}}}")
        assert not pool.equal(r"\int_0^1 x^{x^x} dx", r"\sum_{n=1}^{10^{9}} \frac{1}{n^n}")
        assert pool.equal("x+2", "2+x")
    finally:
        pool.close()


def test_a_dead_worker_counts_as_not_equal_and_is_replaced() -> None:
    pool = algebra.Algebra(workers=1)
    try:
        assert pool.equal("x+1", "1+x")
        worker = pool._idle.get()
        assert worker is not None
        worker.process.kill()
        worker.process.wait()
        pool._idle.put(worker)
        assert not pool.equal("x+3", "3+x")
        assert pool.timeouts == 1
        assert pool.equal("x+4", "4+x")
    finally:
        pool.close()


def test_votes() -> None:
    def served(*answers: str | None) -> int:
        return vote(["no idea" if answer is None else f"\\boxed{{{answer}}}" for answer in answers])

    assert served("1", "2", "2.0") == 1
    assert served("3", "4") == 0  # a tie goes to the answer seen first
    assert served("3", "4", "4", "3") == 0
    assert served(None, None, "7") == 2  # samples without an answer do not vote
    assert served(None, None) == 0
    assert served("0.5", "3", r"\frac{1}{2}", "3", "1/2") == 0
    assert served("5", r"x^2+2x+1", "(x+1)^2") == 0  # what needs algebra is another answer


def test_option_letters_vote_where_there_are_options() -> None:
    options = ["the sun", "the moon"]
    responses = ["The answer is (A).", "It is the moon.", "The answer is B", "The answer is C"]
    assert vote(responses, options) == 1
    assert [vote_key(response, options) for response in responses] == ["A", "B", "B", None]
