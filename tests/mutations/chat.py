"""Chat templates and rows: what an answer is, and what a row says."""

from tests.mutations import Mutation

_SHAPES = "tests/data/test_shapes.py"
_MESSAGES = "tests/data/test_messages.py"
_FILES = "tests/data/test_same_rows.py"
_GIVEN = "tests/runtime/test_chat_template_arguments.py"

MUTATIONS = (
    Mutation(
        "an answer ends at its first special token",
        "data/answer_spans.py",
        "        answer = whole[len(before) : end]\n",
        "        answer = whole[len(before) : end]\n"
        "        first = re.search(special_tokens(tokenizer), answer)\n"
        "        answer = answer[: first.end()] if first else answer\n",
        _SHAPES,
    ),
    Mutation(
        "an answer after <think> in the prompt does not close it",
        "data/answer_spans.py",
        'return rest if close in rest else f"\\n\\n{close}\\n\\n{rest.lstrip()}"',
        "return rest",
        _SHAPES,
    ),
    Mutation(
        "an earlier answer is trained without the reasoning that its row gives",
        "data/answer_spans.py",
        "    if thinks and no_spaces(said) != no_spaces(whole[start : end - len(closing)]):\n"
        "        return None\n",
        "",
        _SHAPES,
    ),
    Mutation(
        "an earlier answer's other end token is taken for the next message",
        "data/answer_spans.py",
        "ends = same or (followed is not None and token != tokenizer.bos_token)",
        "ends = same",
        _SHAPES,
    ),
    Mutation(
        "the next turn repeats the answer's end token",
        "data/chat.py",
        "end = at + len(PROBE) + len(closing_token(tokenizer, tail, answer))",
        "end = at + len(PROBE)",
        _SHAPES,
    ),
    Mutation(
        "what a chat template leaves out vanishes",
        "data/chat_template.py",
        "    if unsaid := _first_lost(tokenizer, template_source(tokenizer), form, what):\n"
        "        raise DataError(left_out_message(unsaid))\n",
        "",
        _SHAPES,
    ),
    Mutation(
        "an answer whose template writes no end token is trained",
        "data/chat.py",
        "        _check_end(tokenizer, answer, message)\n",
        "",
        _SHAPES,
    ),
    Mutation(
        "keys of a message that are not known vanish",
        "data/messages.py",
        "if unknown := [name for name in said if name not in (speaker, words, *_KEYS)]:",
        "if unknown := [name for name in said if name is None]:",
        _MESSAGES,
    ),
    Mutation(
        "tool calls beside words vanish",
        "data/messages.py",
        '            message["tool_calls"] = read_calls(calls, name)\n',
        "",
        _MESSAGES,
    ),
    Mutation(
        "flagged answers are trained all the same",
        "data/messages.py",
        'if message["role"] == "assistant" and trained == {False}:',
        'if message["role"] == "assistant" and not trained:',
        _MESSAGES,
    ),
    Mutation(
        "a column that says something else is passed over",
        "data/columns.py",
        "if not any(text in other or other in text for other in said):",
        "if not said:",
        _MESSAGES,
    ),
    Mutation(
        "a prompt's earlier answers are trained",
        "data/formats.py",
        '{**m, "train": False} if is_answer(m) else m for m in prompt_messages(row, "prompt")',
        'm for m in prompt_messages(row, "prompt")',
        _MESSAGES,
    ),
    Mutation(
        "an empty column counts as given",
        "data/rows.py",
        'if value is not None and value != ""}',
        "if value is not None}",
        _FILES,
    ),
    Mutation(
        "lists stay texts where a file has only texts",
        "data/rows.py",
        "if key in JSON_COLUMNS or all(",
        "if all(",
        _FILES,
    ),
    Mutation(
        "an empty result of a tool drops the conversation",
        "data/rows.py",
        'who in ("user", "human", "assistant", "gpt")',
        "who is not None",
        _FILES,
    ),
    Mutation(
        "a template's date is the clock's",
        "runtime/chat_template_arguments.py",
        'return {"chat_template": template, **arguments}',
        "return dict(arguments)",
        _GIVEN,
    ),
    Mutation(
        "reward models are given the policy's template arguments",
        "models/load.py",
        "config.chat_template_kwargs if of_policy else {}",
        "config.chat_template_kwargs",
        _GIVEN,
    ),
)
