"""What a saved model must hold, and what the cache must not."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "weights that a folder lacks are drawn at random",
        "models/saved.py",
        '    missing = set(told["missing_keys"])',
        "    missing = set()",
        "tests/models/test_saved.py::test_one_task_is_not_another",
    ),
    Mutation(
        "weights that a model has no place for are let go",
        "models/saved.py",
        "    if unexpected:\n",
        "    if False:\n",
        "tests/models/test_saved.py::test_what_a_reward_model_is_not",
    ),
    Mutation(
        "a weight of another shape is drawn at random",
        "models/saved.py",
        '    if wrong := told["mismatched_keys"]:',
        '    if wrong := list(told["mismatched_keys"])[:0]:',
        "tests/models/test_saved.py::test_what_a_reward_model_is_not",
    ),
    Mutation(
        "a reward model gets a fresh head",
        "models/load.py",
        "model, untrained = _model(auto, name, config, dtype, None, fresh_head, num_labels=1)",
        "model, untrained = _model(auto, name, config, dtype, None, True, num_labels=1)",
        "tests/models/test_saved.py::test_what_a_reward_model_is_not",
    ),
    Mutation(
        "an adapter without a score is a reward model",
        "models/load.py",
        "    if untrained and not fresh_head:",
        "    if False:",
        "tests/models/test_adapters.py::test_every_weight_of_an_adapter_is_its_files",
    ),
    Mutation(
        "weights that are not finite are taken",
        "models/saved.py",
        "not torch.stack(w.aminmax()).isfinite().all()",
        "not w.numel()",
        "tests/models/test_saved.py::test_what_a_reward_model_is_not",
    ),
    Mutation(
        "an index may lead anywhere",
        "models/saved.py",
        '        if Path(file).is_absolute() or ".." in Path(file).parts:',
        "        if False:",
        "tests/models/test_saved.py::test_shards",
    ),
    Mutation(
        "experts that are misnamed are taken in another order",
        "models/saved.py",
        "    check_experts(folder, weights)\n    return check_kinds",
        "    return check_kinds",
        "tests/models/test_saved.py::test_experts_are_all_there_and_in_order",
    ),
    Mutation(
        "a config takes all memory before it is refused",
        "models/saved.py",
        "    if asked > 2 * held + 2**24:",
        "    if False:",
        "tests/models/test_saved.py::test_what_a_policy_is_not -k hold",
    ),
    Mutation(
        "a tokenizer without its words is one",
        "models/load.py",
        '    if lost and not (held(name, "tokenizer.json") or held(name, "tokenizer.model")):',
        "    if False:",
        "tests/models/test_saved.py::test_what_a_tokenizer_is_not",
    ),
    Mutation(
        "adapters stand on each other in a circle",
        "models/adapters.py",
        "    below = Path(found)\n",
        "    below = Path()\n",
        "tests/models/test_adapters.py::test_adapters_that_stand_on_each_other_in_a_circle",
    ),
    Mutation(
        "a damaged kernel is loaded",
        "kernels/build.py",
        "        if not _whole(path):",
        "        if not path.is_file():",
        "tests/kernels/test_build.py::test_a_damaged_library_is_told_and_built_anew",
    ),
    Mutation(
        "a kernel that others may write is loaded",
        "kernels/build.py",
        "        if not all(map(_only_ours, filter(Path.exists, (folder, path)))):",
        "        if False:",
        "tests/kernels/test_build.py::test_a_library_that_others_may_write_is_not_loaded",
    ),
    Mutation(
        "a converted model that changed is taken",
        "models/embedded.py",
        "            or digest(p) == whole",
        "            or bool(whole)",
        "tests/models/test_embedded.py",
    ),
)
