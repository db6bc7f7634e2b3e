"""Templates, recipes and rows that have no end, no ground or no sense."""

from tests.mutations import Mutation

_TEMPLATES = "tests/data/test_hostile_templates.py"
_ROWS = "tests/data/test_hostile_rows.py"
_RECIPES = "tests/runtime/test_hostile_recipes.py"

MUTATIONS = (
    Mutation(
        "a chat template may take all the memory",
        "runtime/chat_template_child.py",
        "resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))",
        "pass",
        f"{_TEMPLATES} -k format",
    ),
    Mutation(
        "a chat template may write an endless text",
        "runtime/chat_template_child.py",
        "if len(text) > most:",
        "if not text:",
        f"{_TEMPLATES} -k endless",
    ),
    Mutation(
        "a chat template that is ended each time is tried for ever",
        "runtime/chat_template_renderer.py",
        "if counts[1] >= max(_TRIES, counts[0] // _SHARE):",
        "if counts[1] < 0:",
        f"{_TEMPLATES}::test_one_that_never_ends_is_not_tried_for_ever",
    ),
    Mutation(
        "a renderer that was killed costs the next conversation",
        "runtime/chat_template_renderer.py",
        "for _ in range(2):",
        "for _ in range(1):",
        f"{_TEMPLATES}::test_a_renderer_that_was_ended_is_started_again",
    ),
    Mutation(
        "half a character reaches the tokenizer",
        "data/chat_template.py",
        "return replace_surrogates(text), spans",
        "return text, spans",
        f"{_TEMPLATES}::test_half_a_character_reaches_no_tokenizer",
    ),
    Mutation(
        "a section of a recipe stands inside itself",
        "runtime/yaml_text.py",
        "if id(node) not in self._sizes:",
        "if not node:",
        f"{_RECIPES} -k itself",
    ),
    Mutation(
        "a recipe may nest without end",
        "runtime/yaml_text.py",
        "if self._depth > MAX_DEPTH:",
        "if self._depth < 0:",
        f"{_RECIPES} -k lists",
    ),
    Mutation(
        "a recipe is read from a pipe that never ends",
        "runtime/config.py",
        "if path.exists() and not path.is_file():",
        "if False:",
        f"{_RECIPES}::test_what_is_no_regular_file_is_not_read",
    ),
    Mutation(
        "a row may nest as deep as Python reads",
        "data/rows.py",
        'if text.count("[") + text.count("{") > MAX_NESTING:',
        "if not text:",
        f"{_ROWS}::test_a_hostile_row_is_one_line",
    ),
    Mutation(
        "a small compressed file fills the memory",
        "data/sources.py",
        "content = packed.read(most + 1)",
        "content = packed.read()[:most]",
        f"{_ROWS}::test_a_small_file_that_becomes_huge_is_not_read",
    ),
    Mutation(
        "a small table fills the memory",
        "data/sources.py",
        "most -= (held := text_size(row))",
        "held = characters(row)",
        f"{_ROWS}::test_a_small_table_that_becomes_huge_is_not_read",
    ),
    Mutation(
        "megabytes in a row are tokenized before they are refused",
        "trainers/supervised.py",
        "if size > max(_UNCOUNTED_SIZE, _LONG_TOKEN * min(max_length, context)):",
        "if size < 0:",
        "tests/test_bad_input.py -k megabytes",
    ),
)
