"""What of an answer is run: the program, wherever it stands and however its block is marked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.rewards.code_rewards import extract_code
from gearshift.rewards.completion_text import code_blocks, without_thoughts

PROGRAM = "print(6 * 7)\n"


def fenced(info: str, content: str = PROGRAM, fence: str = "```") -> str:
    return f"{fence}{info}\n{content}{fence}\n"


@pytest.mark.parametrize(
    "info",
    ["python", "Python", "PYTHON", "py", "Py", "py3", "python3", "python3.11", "ipython3",
     " python ", 'python title="x.sh"', "python:main.py", "python,linenos", "python{1,3}",
     "{.python}", "{.python .numberLines}", '{.py title="a b"}', "{python, echo=FALSE}",
     "{code-cell} ipython3",
     "{code-block} python", "main.py", "src/main.py", "language-python", "python # the answer"],
)  # fmt: skip
@pytest.mark.parametrize("after", ["bash", "sh", "text", "console", "json", "", "python-repl"])
def test_the_program_is_run_and_not_what_follows(info: str, after: str) -> None:
    answer = f"Here:\n\n{fenced(info)}\nRun it:\n\n{fenced(after, 'python main.py')}\nThat is all."
    assert extract_code(answer) == PROGRAM


@pytest.mark.parametrize(
    ("text", "code"),
    [
        # The last of its language; others, and empty ones, do not count.
        (fenced("py", "a\n") + fenced("python", "b\n"), "b\n"),
        (fenced("python") + fenced("python", "\n"), PROGRAM),
        (fenced("", "a\n") + fenced("", "b\n"), "b\n"), (fenced("", "a\n") + fenced("sh"), "a\n"),
        (fenced("pycon", ">>> 1\n") + fenced(""), PROGRAM),
        # None at all: the whole text.
        ("a = 1", "a = 1"), ("a ``` b", "a ``` b"), (fenced("js"), fenced("js")), ("", ""),
        # Fences of both kinds, longer ones, one kind inside the other.
        (fenced("python", fence="~~~"), PROGRAM), (fenced("python", fence="`````"), PROGRAM),
        (fenced("python", "s = '''\n```\n'''\n", "````"), "s = '''\n```\n'''\n"),
        (fenced("python", "s = '''\n```py\nx\n```\n'''\n", "~~~"), "s = '''\n```py\nx\n```\n'''\n"),
        (fenced("text", "```python\nno\n```\n", "~~~~") + fenced(""), PROGRAM),
        ("```python\na\n~~~\nb\n```\n", "a\n~~~\nb\n"),
        ("```python\na\n``\nb\n````\n", "a\n``\nb\n"),
        # One that nothing closes; a closing fence has nothing after it.
        ("So:\n```python\na\nb", "a\nb"), ("```python\na\n``` b\nc\n", "a\n``` b\nc\n"),
        ("```python\na\n```   \nb", "a\n"),
        # A backtick in the info string makes it text; a tilde does not.
        ("``` python ` x\nno\n", "``` python ` x\nno\n"), ("~~~ python ` x\na\n", "a\n"),
        # Indentation: of up to three blanks it is taken off, of four it is no fence.
        ("   ```python\n   a\n     b\n  c\n   ```\n", "a\n  b\nc\n"),
        ("x\n\n    ```python\n    a\n", "x\n\n    ```python\n    a\n"),
        # Line ends of Windows, lists, quotes, tags.
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb\n"),
        ("1. So:\n\n   ```python\n   a\n   ```\n", "a\n"),
        ("- ```python\n  a\n    b\n  ```\n", "a\n  b\n"), ("> ```python\n> a\n> ```\n\nb", "a\n"),
        ("<answer>\n```python\na\n```\n</answer>", "a\n"),
        # Thoughts.
        ("<think>\n```python\ndraft\n```\n</think>\na = 1", "\na = 1"),
        ("<think>\n```python\nopen\n</think>\n" + fenced("python"), PROGRAM),
        ("Hm.\n```python\nopen\n</think>\n\n" + fenced("python"), PROGRAM),
        (fenced("python", "print('</think>')\n"), "print('</think>')\n"),
        ("<think>\n" + fenced("python"), ""),
    ],
)  # fmt: skip
def test_fences_are_commonmarks(text: str, code: str) -> None:
    assert extract_code(text) == code


@given(
    st.text(alphabet="ab =\n`~'\"\t", max_size=40).filter(lambda text: text.strip()),
    st.sampled_from("`~"),
    st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_block_gives_back_what_was_put_between_its_fences(
    content: str, kind: str, indent: int
) -> None:
    fence = kind * 41  # longer than any in the content
    lines = "".join(f"{' ' * indent}{line}\n" for line in content.split("\n"))
    [block] = code_blocks(f"Here:\n\n{' ' * indent}{fence}Python\n{lines}{fence}\n\nDone.")
    assert (block.language, block.content) == ("python", content + "\n")


def test_thoughts_are_what_an_answer_begins_with() -> None:
    assert without_thoughts(" <think>a</think> b </think> c") == " b </think> c"
    assert without_thoughts("a\n</think>\nb") == "\nb"
    assert without_thoughts("a </think> b") == "a </think> b"
    assert without_thoughts("a <think>b</think>") == "a <think>b</think>"
