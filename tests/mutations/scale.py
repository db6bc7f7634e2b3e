"""Several processes of one run."""

from tests.mutations import Mutation

EQUAL = "tests/scale/test_equal.py::test_ranks_change_nothing"
MUTATIONS = (
    Mutation(
        "a loss is the mean of its own micro-batch",
        "trainers/sft.py",
        "    loss = -(weights_M * scores.logprobs).sum()\n",
        "    loss = -(weights_M * scores.logprobs).sum() / weights_M.sum()\n",
        f"{EQUAL}[sft-of-one-micro-batch-2]",
    ),
    Mutation(
        "the ranks' gradients are averaged",
        "runtime/distributed.py",
        "_reduce_scatter(own, whole)",
        "_reduce_scatter(own, whole.div_(self.size))",
        f"{EQUAL}[sft-2]",
    ),
    Mutation(
        "a rank clips by the norm of its own part",
        "runtime/optimizer.py",
        "parts = world().sum((parts * shares.to(parts.device)).sum())",
        "parts = parts * shares.to(parts.device)",
        f"{EQUAL}[sft-2]",
    ),
    Mutation(
        "groups are dealt by their id, and their rewards by position",
        "rewards/composite.py",
        "[next(c) for c in of_rank[t.group_id % world().size]] for t in trajectories",
        "[next(c) for c in of_rank[i // 4 % world().size]] for i, _ in enumerate(trajectories)",
        f"{EQUAL}[lost-rewards-2]",
    ),
    Mutation(
        "a rank normalises its own rewards",
        "rewards/composite.py",
        "        results, calls = self._of_functions(trajectories)\n",
        "        results, calls = self._of_functions(trajectories)\n"
        "        results = [self._running[i](r) for i, r in enumerate(results)]\n",
        f"{EQUAL}[normalised-function-2]",
    ),
    Mutation(
        "a function that raises on each rank is asked for as many groups more",
        "rewards/composite.py",
        "self._judge(call for _, calls, _ in parts for call in calls)",
        "self._judge(parts[world().rank][1])",
        f"{EQUAL}[a-function-that-raises-2]",
    ),
    Mutation(
        "all ranks drop the same units out",
        "trainers/stage.py",
        'return f"/{world().rank}" if world().rank else ""',
        'return ""',
        "tests/scale/test_equal.py::test_each_rank_has_random_numbers_of_its_own",
    ),
    Mutation(
        "a speed is one rank's",
        "trainers/speed.py",
        "sum(tokens for tokens, _ in work)",
        "work[0][0]",
        "tests/scale/test_equal.py::test_speeds_are_those_of_all_ranks",
    ),
    Mutation(
        "ranks that are started again meet by the addresses of those that ended",
        "runtime/meeting.py",
        "name, until = uuid4().hex,",
        'name, until = "start",',
        "tests/runtime/test_meeting.py",
    ),
    Mutation(
        "a second run in one program meets by the addresses of the first",
        "runtime/meeting.py",
        '{next(_meetings)}"',
        '0"',
        f"{EQUAL}[train_sft-then-train_dpo-2]",
    ),
)
