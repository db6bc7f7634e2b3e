"""Models that would be computed wrongly."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a state beside keys and values is not looked for",
        "models/exact.py",
        "        if isinstance(module, nn.Conv1d) or _STATE.search(kind):",
        "        if False:",
        "tests/models/test_check.py",
    ),
    Mutation(
        "a described plan is not compared with Hugging Face",
        "models/check.py",
        "    if not (gap := _gap(model, ours, theirs)) <= 1:",
        "    if not (gap := _gap(model, ours, theirs)) <= 1e9:",
        "tests/models/test_check.py::test_a_plan_that_is_wrong_is_refused",
    ),
    Mutation(
        "longrope's frequencies follow the batch's longest sequence",
        "models/exact.py",
        'if kind == "longrope" and',
        'if kind == "never" and',
        "tests/models/test_check.py::test_what_is_right_up_to_a_length_runs_up_to_it",
    ),
    Mutation(
        "a window that only Hugging Face's mask knows is not looked for",
        "models/exact.py",
        "and size not in windows:",
        "and False:",
        "tests/models/test_check.py::test_what_is_right_up_to_a_length_runs_up_to_it",
    ),
    Mutation(
        "two attentions of a layer write one store",
        "engine/cached_forward.py",
        "        if layer in self._written:",
        "        if False:",
        "tests/models/test_check.py::test_a_refusal_names_family_and_reason",
    ),
    Mutation(
        "attention masks that a model makes are ignored",
        "models/attention.py",
        'if attention_mask is not None or others.get("position_bias") is not None:',
        "if False:",
        "tests/models/test_check.py::test_a_refusal_names_family_and_reason",
    ),
    Mutation(
        "a table of positions is read beyond its end",
        "engine/captured_step.py",
        "self.positions.add_(1).clamp_(max=forward.max_length - 1)",
        "self.positions.add_(1)",
        "tests/engine/test_steps.py",
    ),
    Mutation(
        "the prefix cache outlives a switch of adapters",
        "engine/weights.py",
        "        return written, *map(switched, self._adapted)",
        "        return (written,)",
        "tests/engine/test_hybrid.py",
    ),
    Mutation(
        "weights that changed within the generation gear keep their cache",
        "engine/hybrid.py",
        "        self._follow()\n        self._prepack()\n",
        "        pass\n",
        "tests/engine/test_hybrid.py",
    ),
    Mutation(
        "values of another size than the queries' are not cut back",
        "models/attention.py",
        ".transpose(1, 2)[..., :own], None",
        ".transpose(1, 2), None",
        "tests/models/test_families.py::test_right_or_refused[deepseek_v3]",
    ),
    Mutation(
        "soft cap of a text config inside is not read",
        "models/describe.py",
        "    config = model.config.get_text_config()\n    scale",
        "    config = model.config\n    scale",
        "tests/models/test_check.py::test_a_text_config_inside_is_read",
    ),
    Mutation(
        "a layer runs beside its unit, so that nothing gathers its weights",
        "models/layers.py",
        "            x, delta = run_in(layer.unit, one, i, x, delta)",
        "            x, delta = one(i, x, delta)",
        "tests/models/test_units.py",
    ),
    Mutation(
        "weights that lie in another order are taken for one buffer",
        "models/fused.py",
        "== storage and part.storage_offset() == place",
        "== storage",
        "tests/models/test_fused.py",
    ),
    Mutation(
        "weights that lie end to end are copied",
        "models/fused.py",
        "        return first.as_strided((rows, *first.shape[1:]), first.stride())",
        "        pass",
        "tests/models/test_fused.py",
    ),
)
