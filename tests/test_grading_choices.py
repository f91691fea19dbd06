"""Letters of multiple-choice responses, and the judge's ratings."""

import re

import pytest
from stub_endpoint import stub_endpoint

from pipelines.grading import judge
from pipelines.tasks import task
from s2t_models.answers.choices import choice

CHOSEN = [
    ("The answer is (C).", "C"),
    ("The answer is A good idea to test. So the answer is (B).", "B"),
    ("Option A is wrong because it is a lie. Option B is a fish. Therefore the answer is C", "C"),
    ("**Answer:** D", "D"),
    ("Answer: C", "C"),
    ("correct answer: A", "A"),
    ("\\boxed{D}", "D"),
    ("$\\boxed{\\text{(B)}}$", "B"),
    ("The final answer is: $\\boxed{J}$", "J"),
    ("So, the correct option is $\\mathbf{C}$.", "C"),
    ("The correct answer is **B**.", "B"),
    ("The answer is **(C) 42**", "C"),
    ('The answer is "C".', "C"),
    ("B", "B"),
    ("b", "B"),
    ("(c)", "C"),
    ("answer is (d)", "D"),
    ("The answer is a.", "A"),
    ("## Answer\nC", "C"),
    ("C. Planetary days", "C"),
    ("My answer: C) Paris", "C"),
    ("A is incorrect. B is incorrect. C is correct. D is incorrect.", "C"),
    ("Among these, option D is the correct answer, not A.", "D"),
    ("I would choose D because a dog is an animal", "D"),
    ("A common mistake is A. The answer is (D) but a student may say (A).", "D"),
    ("the answer is not A. It is B.", "B"),
    ("The best answer is therefore option (E).", "E"),
    ("The answer is B because A fails", "B"),
    ("The answer is A because B fails", "A"),
    ("The correct answer is A, since it holds", "A"),
    ("The answer is (A). Wait, I made an error. The answer is (B).", "B"),
    ("So the answer is (F).\n\nQuestion: next? The answer is (A).", "F"),
    ("<think>The answer is A</think>The answer is C.", "C"),
    ("The answer is I.", "I"),
    ("we get 12 m/s. Hence G.", "G"),
    ("It is a cat.", None),
    ("I think that a fish cannot.", None),
    ("I'm not sure. I do not know.", None),
    ("A is wrong.", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "letter"), CHOSEN)
def test_choice(response: str, letter: str | None) -> None:
    assert choice(response, "ABCDEFGHIJ") == letter


def test_only_letters_on_offer_count() -> None:
    assert choice("The answer is (E).", "ABCD") is None
    assert choice("The answer is (E).", "ABCDE") == "E"


def test_the_text_of_an_option_names_it_when_it_is_unambiguous() -> None:
    options = ["the sun", "the sun and the moon", "the moon", "A decrease in heat"]
    assert choice("Clearly it must be the moon.", "ABCD", options) == "C"
    assert choice("Therefore: the sun and the moon", "ABCD", options) == "B"
    assert choice("The answer is A decrease in heat.", "ABCD", options) == "D"
    assert choice("It is the moon or a decrease in heat.", "ABCD", options) is None


def official(text: str) -> str | None:
    """MMLU-Pro's published extraction: "answer is (X)", then "Answer: X", then the last letter that stands alone."""
    for pattern in (r"answer is \(?([A-J])\)?", r".*[aA]nswer:\s*([A-J])", r"\b([A-J])\b(?!.*\b[A-J]\b)"):
        found = re.search(pattern, text, 0 if "nswer" in pattern else re.DOTALL)
        if found:
            return found[1]
    return None


@pytest.mark.parametrize(
    "ending",
    [
        "The answer is ({0}).",
        "Therefore, the answer is {0}.",
        "the answer is ({0}) 42 m/s.",
        "Answer: {0}",
        "Answer: ({0}",
        "**Answer: {0}**",
        "So we choose {0}",
        "Hence ({0}).",
    ],
)
def test_agrees_with_the_published_extraction(ending: str) -> None:
    for letter in "ABCDEFGHIJ":
        for working in (
            "Let's think step by step. ",
            "We refer to options B, C and D. ",
            "A force acts; I take F = ma.\n",
        ):
            response = working + ending.format(letter)
            assert choice(response, "ABCDEFGHIJ") == (official(response) or letter)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("[[8.5]]", 8.5),
        ("[[7]] ... as said, [[7]]", 7.0),
        ("Rating: [7]", None),
        ("Rating: 7", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[5]] or [[6]]", None),
        ("[[rating]]", None),
    ],
)
def test_ratings_are_read_strictly(text: str, value: float | None) -> None:
    assert judge.rating(text) == value


def test_mt_bench_asks_the_published_prompts(data_dir) -> None:  # type: ignore[no-untyped-def]
    from pipelines.tasks import mt_bench

    items = {item.metadata["category"]: item for item in task("mt_bench").load(data_dir)}
    asked: list[list[dict[str, str]]] = []

    def ask(chat: list[dict[str, str]]) -> str:
        asked.append(chat)
        return f"Fine. Rating: [[{6 + len(asked) % 2 * 2}]]"

    graded = mt_bench.judged(["first {answer}", "second"], items["writing"], ask)
    assert (graded.verdict, graded.extracted, graded.score) == ("correct", "8, 6", pytest.approx(0.7))
    assert asked[0][0]["content"] == "You are a helpful assistant."
    assert "first {answer}" in asked[0][1]["content"]
    assert "second user question" in asked[1][0]["content"]
    assert all(text in asked[1][1]["content"] for text in (*items["writing"].metadata["turns"], "second"))
    mt_bench.judged(["a", "b"], items["math"], ask)
    assert items["math"].answer[0] in asked[2][1]["content"]
    assert all(answer in asked[3][1]["content"] for answer in items["math"].answer)
    assert mt_bench.judged(["a", "b"], items["math"], lambda chat: "no rating").verdict == "errored"
    with pytest.raises(ValueError, match="2 turns, but there are 1 answers"):
        mt_bench.judged(["a"], items["math"], ask)


def test_the_judge_takes_the_room_there_is_and_says_why_it_cannot_answer():
    overflow = {"error": {"message": "the prompt is too long", "code": "context_length_exceeded"}}
    chat = [{"role": "user", "content": "Rate this."}]
    with stub_endpoint({}) as server:
        ask = judge.endpoint(f"{server.url}/v1", "llm")
        server.fault = lambda body, asked: (400, overflow, {}) if "max_tokens" in body else None
        assert ask(chat) == server.answer(server.bodies[-1])["choices"][0]["message"]["content"]
        server.fault = lambda body, asked: (400, overflow, {})
        with pytest.raises(judge.JudgeError, match=r"400: .*the prompt is too long"):
            ask(chat)
        server.fault = lambda body, asked: (404, {"error": {"message": "no such model"}}, {})
        with pytest.raises(judge.JudgeError, match=r"404: .*no such model"):
            ask(chat)
