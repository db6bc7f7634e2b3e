"""Splits, clusters and intervals."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "rows of one template count as independent in an interval",
        "rollouts/intervals.py",
        "of_N = np.array([number.setdefault(c, len(number)) for c in clusters])",
        "of_N = np.arange(len(clusters))",
        "tests/rollouts/test_intervals.py",
    ),
    Mutation(
        "a rate of 0 of k templates has an interval as if each row were a trial",
        "rollouts/intervals.py",
        "    if rate in (0.0, 1.0):\n        return wilson(rate, k)",
        "    if rate in (0.0, 1.0):\n        return wilson(rate, len(x_N))",
        "tests/rollouts/test_intervals.py",
    ),
    Mutation(
        "a gain is told apart from noise by its interval alone",
        "rollouts/evaluate.py",
        "return self.p < 0.05 and not",
        "return not",
        "tests/rollouts/test_evaluate.py",
    ),
    Mutation(
        "equal prompts count as several problems",
        "pipeline/task_data.py",
        "texts = [prompt_text(prompt_of(row)) or i for i, row in enumerate(rows)]",
        "texts = list(range(len(rows)))",
        "tests/pipeline/test_heldout.py::test_problems_are_named_by_the_task_or_by_equal_prompts",
    ),
    Mutation(
        "failed held-out episodes leave the success rate",
        "rollouts/evaluate.py",
        'return metric == "success" or not sample.get("failed", False)',
        'return not sample.get("failed", False)',
        "tests/rollouts/test_evaluate.py",
    ),
    Mutation(
        "a run is evaluated on rows that it trained on",
        "pipeline/provenance.py",
        "if not (key and key in known) and",
        "if",
        "tests/pipeline/test_heldout.py",
    ),
    Mutation(
        "the same prompt in other letters stands in two splits",
        "data/overlap.py",
        'unicodedata.normalize("NFKC", text).casefold().split()',
        "text.split()",
        "tests/tasks/test_rows.py",
    ),
    Mutation(
        "a test request is one that a validation template reads",
        "tasks/voice/task.py",
        "others = {t.text for t in (*training, *heldout)} - mine",
        "others = {t.text for t in training}",
        "tests/tasks/test_voice.py::test_heldout_is_unseen",
    ),
    Mutation(
        "games of held-out starts are learned from in supervised tuning",
        "tasks/gym.py",
        'if known and start_of(opening, info.get("row")) not in known:',
        "if False:",
        "tests/environments/test_gym_games.py::test_no_start_is_in_two_splits",
    ),
    Mutation(
        "validation and test draw the same seeds",
        "rollouts/evaluate.py",
        '"test": 3 << 30',
        '"test": 1 << 31',
        "tests/rollouts/test_evaluate.py",
    ),
    Mutation(
        "means of two to five problems have the range of their resamples as interval",
        "rollouts/intervals.py",
        "    if k < FEW:",
        "    if k < 0:",
        "tests/rollouts/test_intervals.py",
    ),
    Mutation(
        "one's own rows of one cluster stand in two splits",
        "tasks/rows.py",
        "clusters = [i if name is None else str(name) for i, name in enumerate(named)]",
        "clusters = list(range(len(named)))",
        "tests/tasks/test_rows.py::test_no_cluster_stands_in_two_splits",
    ),
    Mutation(
        "why every held-out episode failed is not said",
        "rollouts/evaluate.py",
        'lost[what], why[what] = lost[what] + failed, last.rstrip(".")',
        'lost[what], why[what] = lost[what] + failed, ""',
        "tests/rollouts/test_evaluate.py -k made_every_episode_fail",
    ),
    Mutation(
        "memory is freed for the count while a view of it lives",
        "runtime/peak_memory.py",
        "        if any(result.alias_info for result in func._schema.returns):  # a view\n"
        "            return func(*args, **kwargs)\n",
        "        self.live = 0\n",
        "tests/pipeline/test_activations.py",
    ),
    Mutation(
        "the memory of an operation is that of another one with equal arguments",
        "runtime/peak_memory.py",
        "isinstance(x, Tensor) else (type(x), x)",
        "isinstance(x, Tensor) else (None, x)",
        "tests/pipeline/test_activations.py::test_equal_arguments_of_other_types_are_other_operations",
    ),
)
