"""What must not depend on what else runs, and what a run leaves behind."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "fp32 products by the library, whose sums depend on how many rows there are",
        "kernels/cpu.py",
        "if not self._has_linear or not fits or given != {torch.float32} or not K:",
        "if self._has_linear or not fits or given != {torch.float32} or not K:",
        "tests/invariants/test_3_sampling_is_a_pure_function.py::test_greedy_too",
    ),
    Mutation(
        "an adapter's products by the library",
        "models/fused.py",
        "low = multiply(x.to(down.weight.dtype), down.weight, down.bias)",
        "low = F.linear(x.to(down.weight.dtype), down.weight, down.bias)",
        "tests/invariants/test_3_sampling_is_a_pure_function.py::test_what_is_computed_together_does_not_matter",
    ),
    Mutation(
        "a second thread inside an engine is let in",
        "engine/owner.py",
        "if self._holder not in (None, holder):",
        "if False:",
        "tests/engine/test_owner.py",
    ),
    Mutation(
        "a collector's threads stay",
        "rollouts/environment_pool.py",
        "        self._workers.close()\n        if isinstance",
        "        if isinstance",
        "tests/reliability/test_many_runs.py::test_a_run_that_fails_leaves_nothing_open",
    ),
    Mutation(
        "a run keeps its number of threads in the host program",
        "pipeline/run.py",
        "        finally:\n            torch.set_num_threads(threads)",
        "        finally:\n            pass",
        "tests/reliability/test_many_runs.py::test_a_run_leaves_torch_as_it_was",
    ),
)
