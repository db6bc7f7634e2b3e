"""Quiet failures of models that are split over the ranks."""

from tests.mutations import Mutation

_TESTS = "tests/scale/test_fsdp.py -k two_ranks"

_ONLY = "tests/scale/test_fsdp.py -k without_the_whole"

MUTATIONS = (
    Mutation(
        "a rank with fewer micro-batches does not come to the layers of the others",
        "runtime/distributed.py",
        "- len(own) if self.sharded else 0",
        "- len(own) if self.sharded and False else 0",
        _ONLY,
    ),
    Mutation(
        "the whole model stays in memory though servers sample",
        "engine/hybrid.py",
        "self._watch.moved()  # it knows the whole weights no more",
        "pass  # it knows the whole weights no more",
        _ONLY,
    ),
    Mutation(
        "each rank averages its rows with those of another place",
        "runtime/sharded_parameter.py",
        "rows = rows[of * each :][:each]",
        "rows = rows[:each]",
        "tests/scale/test_fsdp.py -k saved",
    ),
    Mutation(
        "the ranks' gradients are averaged, not added up",
        "models/sharded.py",
        "unit.set_gradient_divide_factor(1.0)",
        "unit.set_gradient_divide_factor(float(world().size))",
        _TESTS,
    ),
    Mutation(
        "each rank reads all rows of the files",
        "models/read_in_parts.py",
        "read: int = own.nbytes",
        "read: int = saved[...].nbytes",
        "tests/scale/test_fsdp.py -k parts",
    ),
    Mutation(
        "a model that could be read in parts is loaded whole",
        "models/from_pretrained.py",
        "if world().sharded:",
        "if False:",
        "tests/scale/test_fsdp.py -k parts",
    ),
    Mutation(
        "each rank clips by the norm of its own rows",
        "runtime/optimizer.py",
        "parts = world().sum((parts * shares.to(parts.device)).sum())",
        "parts = parts * shares.to(parts.device)",
        _TESTS,
    ),
    Mutation(
        "rows that two nodes hold count twice in the norm",
        "runtime/sharded_parameter.py",
        "self.copies = mesh.size() // mesh.size(mesh.ndim - 1)",
        "self.copies = 1",
        "tests/scale/test_fsdp.py -k two_nodes",
    ),
    Mutation(
        "a micro-batch that only makes the count even is learned from",
        "trainers/update.py",
        "[(micros[0][0], 0.0)] * missing",
        "[(micros[0][0], 1.0)] * missing",
        _TESTS,
    ),
    Mutation(
        "the model generates with the weights of before the update",
        "engine/hybrid.py",
        "        self.runner.weights_changed()\n",
        "",
        _TESTS,
    ),
    Mutation(
        "a forward pass that an error cut goes on in the next one",
        "models/runner.py",
        "self._sharded.reset()",
        "pass",
        _TESTS,
    ),
)
