"""Rewards, advantages, what a rollout leaves out, gradients."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a reward that does not apply deletes the episode",
        "rewards/composite.py",
        "results.insert(0, [None if t.rewarded == () else t.reward for t in trajectories])",
        "results.insert(0, [None] * len(trajectories))",
        "tests/rewards/test_composite.py -k what_does_not_apply",
    ),
    Mutation(
        "a source of weight 0 deletes what it is only to log",
        "rewards/functions.py",
        "terms = [w * v for w, v in zip(weights, values, strict=True) if w and v is not None]",
        "terms = [w * v for w, v in zip(weights, values, strict=True) if v is not None]",
        "tests/rewards/test_composite.py -k what_does_not_apply",
    ),
    Mutation(
        "a lost reward counts as 0",
        "rewards/functions.py",
        "return sum(terms) if terms and is_usable(sum(terms)) else None",
        "return sum(t for t in terms if usable(t)) if terms else None",
        "tests/rewards/test_composite.py -k what_does_not_apply",
    ),
    Mutation(
        "normalisation is poisoned by a reward that is not finite",
        "rewards/composite.py",
        "            if x is not None and is_usable(x):\n                self.count += 1",
        "            if x is not None:\n                self.count += 1",
        "tests/rewards/test_composite.py -k poisoned",
    ),
    Mutation(
        "the length of all turns is held against the limit of one",
        "trainers/rl/batching.py",
        "lengths_K = torch.tensor([len(list(run)) for written, run in runs if written])\n"
        "    return lengths_K.cumsum(0) - 1, lengths_K",
        "lengths_K = torch.tensor([len(list(run)) for written, run in runs if written])\n"
        "    return lengths_K.cumsum(0) - 1, lengths_K.cumsum(0)",
        "tests/trainers/test_guards.py -k own_limit",
    ),
    Mutation(
        "advantages are whitened by what is masked",
        "trainers/rl/experience.py",
        "advantages_M = whiten(advantages_M, counted_M, lengths_N, group_N)",
        "advantages_M = whiten(advantages_M, counted_M | ~counted_M, lengths_N, group_N)",
        "tests/trainers/test_guards.py -k whitened",
    ),
    Mutation(
        "a greedy episode that was lost is no reason to leave its group out",
        "trainers/rl/loop.py",
        "known = [t for t in trajectories if t.group_id in greedy]",
        "known = trajectories\n"
        "        greedy = {t.group_id: greedy.get(t.group_id, t.reward) for t in known}",
        "tests/trainers/test_left_out.py -k greedy",
    ),
    Mutation(
        "a turn's reward of 0 is no reward",
        "trainers/rl/experience.py",
        "            given_M=given_rewards(trajectories).to(device),\n",
        "",
        "tests/trainers/test_guards.py -k reward_of_0",
    ),
    Mutation(
        "the value net's warm-up uses the policy's schedule up",
        "trainers/rl/loop.py",
        "        if config.value:  # the policy does not learn in the value net's warm-up",
        "        if False:",
        "tests/trainers/test_guards.py -k schedule",
    ),
    Mutation(
        "counts of what was left out begin anew at a resume",
        "trainers/rl/loop.py",
        "stage.track(rewards=score, left_out=self.left_out)",
        "stage.track(rewards=score)",
        "tests/trainers/test_left_out.py -k resume",
    ),
    Mutation(
        "what is alone in its group is learned from without a baseline",
        "trainers/rl/collect.py",
        "several = [group for group in groups if len(group) > 1]",
        "several = list(groups)",
        "tests/trainers/test_left_out.py -k alone",
    ),
    Mutation(
        "fewer groups than minibatches end the run",
        "trainers/rl/batching.py",
        "count = min(count, len(groups))",
        "pass",
        "tests/trainers/test_left_out.py -k minibatches",
    ),
    Mutation(
        "a prompt too long at its turn ends the run",
        "rollouts/episode.py",
        "            if episode.turn == 0:\n",
        "            if False:\n",
        "tests/rollouts/test_collector.py -k no_place",
    ),
    Mutation(
        "prompts that are too long are not told before the first step",
        "rollouts/collector.py",
        "            if not 0 < tokens <= most:\n",
        "            if not tokens:\n",
        "tests/trainers/test_left_out.py -k before_the_first_step",
    ),
    Mutation(
        "rewards are asked for a prompt that ends with the answer",
        "rollouts/episode.py",
        "        del self.messages[self.answered_messages :]\n",
        "",
        "tests/rollouts/test_collector.py -k conversation_before",
    ),
    Mutation(
        "from turn 256 on random numbers repeat",
        "rollouts/episode.py",
        "return (turn >> 8) << 56 | group << 24 | (turn & 255) << 16 | sample",
        "return group << 24 | turn << 16 | sample",
        "tests/rollouts/test_collector.py -k turn_256",
    ),
    Mutation(
        "the policy steps before the value net's gradient is looked at",
        "trainers/update.py",
        "        norms = [optimizer.norm() for optimizer in optimizers]\n",
        "        norms = [optimizers[0].norm(), *[0.0] * (len(optimizers) - 1)]\n",
        "tests/trainers/test_update.py -k no_optimizer",
    ),
    Mutation(
        "gradients of micro-batches are added up in bf16",
        "trainers/update.py",
        "            if len(micros) > 1:\n",
        "            if False:\n",
        "tests/trainers/test_update.py -k bf16",
    ),
    Mutation(
        "a critic that no advantage asks for is loaded",
        "trainers/rl/config.py",
        "if advantage.name not in NEEDS_VALUES:",
        "if False:",
        "tests/trainers/test_rl_config.py -k refused",
    ),
    Mutation(
        "a section of another kind keeps the file's keys",
        "runtime/config.py",
        "    if not switched:\n",
        "    if True:\n",
        "tests/trainers/test_rl_config.py -k anew",
    ),
)
