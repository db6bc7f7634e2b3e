"""What a call from Python means."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a call with other rows is given the run of the first",
        "pipeline/arguments.py",
        "made = [identity(validated(Recipe, self.tree)), self.files, given.digests()]",
        "made = [identity(validated(Recipe, self.tree)), given.digests()]",
        "tests/pipeline/test_api.py -k other_rows_have_a_run",
    ),
    Mutation(
        "a run goes on with other rows than it began with",
        "pipeline/given.py",
        "if begun and path.exists():",
        "if False:",
        "tests/pipeline/test_api.py -k other_rows_are_refused",
    ),
    Mutation(
        "the weights of rewards are dropped",
        "pipeline/api.py",
        '"weight": weight}',
        '"weight": 1.0}',
        "tests/pipeline/test_api.py -k rewards_have_weights",
    ),
    Mutation(
        "importing the package imports torch",
        "__init__.py",
        "import importlib\n",
        "import importlib\n\nimport torch\n",
        "tests/pipeline/test_api.py -k imports_nothing",
    ),
    Mutation(
        "an algorithm that is given gives way to a config's",
        "pipeline/api.py",
        'if isinstance(default := arguments.tree.get("algorithm"), Default):',
        'if own and isinstance(default := arguments.tree.get("algorithm"), str):',
        "tests/pipeline/test_python_calls.py -k wrong_argument",
    ),
)
