"""The run page: what it reads of a run, and what it must not."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a link in a run's folder leads to any file",
        "serve/runs/files.py",
        "return path.resolve().is_relative_to(self.path)",
        "return True",
        "tests/serve/runs/test_routes.py -k links_outside",
    ),
    Mutation(
        "a stage is any path",
        "serve/runs/files.py",
        "return path if stage in self.stages() and self._safe(path) else None",
        "return path",
        "tests/serve/runs/test_routes.py -k inside_the_run",
    ),
    Mutation(
        "a run that is resumed goes on with the curves of the run that was cut",
        "serve/runs/routes.py",
        "if (newest and (not lines or lines.pop(0)[1] != newest)) or now[0] < offset:",
        "if newest and lines and not lines.pop(0):",
        "tests/serve/runs/test_routes.py -k t60",
    ),
    Mutation(
        "half a surrogate pair in a text breaks the table",
        "serve/runs/routes.py",
        'text = json.dumps(value, separators=(",", ":"), allow_nan=False)',
        "text = json.dumps(value, ensure_ascii=False, allow_nan=False)",
        "tests/serve/runs/test_routes.py -k t62",
    ),
    Mutation(
        "a figure of a later turn is shown at the environment's words",
        "serve/runs/episodes.py",
        "columns[name] = [next(values) if m else None for m in mask]",
        "columns[name] = [None] * len(prompt) + [next(values, None) for _ in ids]",
        "tests/serve/runs/test_routes.py -k all_its_figures",
    ),
)
