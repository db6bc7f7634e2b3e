"""Faults of captured steps and of the cache on a GPU, which tests find without one."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "captured steps outlive a switch of adapters",
        "engine/weights.py",
        "addresses, [*map(switched, self._adapted)]",
        "addresses, []",
        "tests/engine/test_captures.py",
    ),
    Mutation(
        "what a row samples after its end is looked at",
        "engine/scheduler.py",
        "                if sequence.finish_reason is not None:\n                    continue",
        "                if False:\n                    continue",
        "tests/engine/test_captures.py",
    ),
    Mutation(
        "a pool is opened again after its graphs are gone",
        "kernels/cuda_graphs.py",
        "if newest else torch.cuda.graph_pool_handle()",
        "if newest else (0, 1)",
        "tests/kernels/test_cuda_graphs.py",
    ),
    Mutation(
        "a graph reads tensors that are gone",
        "kernels/cuda_graphs.py",
        "return _Graph(graph, out, (prepare, run))",
        "return _Graph(graph, out, ())",
        "tests/kernels/test_cuda_graphs.py",
    ),
    Mutation(
        "a capture forbids other threads to use the GPU",
        "kernels/cuda_graphs.py",
        'capture_error_mode="thread_local"',
        'capture_error_mode="global"',
        "tests/kernels/test_cuda_graphs.py",
    ),
    Mutation(
        "a step that waits for the device is captured",
        "kernels/cuda_graphs.py",
        "            if waits.found:\n",
        "            if False:\n",
        "tests/kernels/test_cuda_graphs.py",
    ),
    Mutation(
        "each width of block tables has its own graphs",
        "engine/decoder.py",
        "            width = self._longest\n",
        "            pass\n",
        "tests/engine/test_captures.py",
    ),
    Mutation(
        "a GPU's cache depends on the first request",
        "engine/cache_size.py",
        "return int(min(most, allowed / block))",
        "return int(min(most, needed))",
        "tests/engine/test_captures.py",
    ),
    Mutation(
        "weights that are split over processes are taken for whole ones",
        "engine/weights.py",
        "        if split or not parameter.numel():",
        "        if False:",
        "tests/engine/test_weights.py",
    ),
    Mutation(
        "weights are moved out of the buffer that another library trains",
        "models/fused.py",
        "        if not stays and any(",
        "        if False and any(",
        "tests/engine/test_weights.py",
    ),
    Mutation(
        "a second GPU's kernels are launched on the first",
        "kernels/triton_ops.py",
        "with torch.cuda.device_of(query), _named_errors(D):",
        "with _named_errors(D):",
        "tests/kernels/test_triton_ops.py",
    ),
    Mutation(
        "a second GPU's streams are made on the first",
        "engine/hybrid.py",
        "with torch.cuda.device_of(next(self.model.parameters())):",
        "with torch.no_grad():",
        "tests/engine/test_current_device.py",
    ),
    Mutation(
        "a model's GPU does not become the current one",
        "models/load.py",
        "        torch.cuda.set_device(device)",
        "        pass",
        "tests/models/test_load.py",
    ),
    Mutation(
        "bf16 that a GPU only emulates is taken for fast",
        "models/load.py",
        "is_bf16_supported(including_emulation=False)",
        "is_bf16_supported()",
        "tests/models/test_load.py",
    ),
)
