"""Quiet failures of completions that another program samples."""

from tests.mutations import Mutation

_TESTS = "tests/rollouts/test_vllm.py"

MUTATIONS = (
    Mutation(
        "the servers keep the weights of before the update",
        "trainers/push.py",
        "if self._pushed != self._engine.weights_version:",
        "if self._pushed < 0:",
        f"{_TESTS} -k dealt",
    ),
    Mutation(
        "episodes are begun ahead before the weights are pushed",
        "trainers/rl/collect.py",
        """                with self.collector.generating():
                    for those""",
        """                with nullcontext():
                    for those""",
        f"{_TESTS} -k sampling_ahead",
    ),
    Mutation(
        "more steps are begun ahead while requests of earlier ones still run",
        "trainers/rl/collect.py",
        "if later and not self.collector.has_begun(later[0]):",
        "if later:",
        f"{_TESTS} -k sampling_ahead",
    ),
    Mutation(
        "an answer that no push changed passes the probe",
        "trainers/push.py",
        "if moved > _CHANGED:",
        "if moved > 1e9:",
        f"{_TESTS} -k missed_by_no_probe",
    ),
    Mutation(
        "log-probs of a truncated distribution are taken for the policy's",
        "rollouts/vllm.py",
        "[math.nan] * len(drawn)",
        "drawn",
        f"{_TESTS} -k truncated_distribution",
    ),
    Mutation(
        "a server's end token, which is not the policy's, ends a completion",
        "rollouts/vllm.py",
        '"ignore_eos": True,',
        '"ignore_eos": False,',
        f"{_TESTS} -k greedy",
    ),
    Mutation(
        "nothing corrects for a sampler that is another program",
        "pipeline/recipe.py",
        'tree["rl"] = {**rl, "importance": {"mode": "token_truncate"}}',
        "pass",
        f"{_TESTS} -k importance",
    ),
)
