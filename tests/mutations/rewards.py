"""Reward models and adapters."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a reward model starts from the policy's base and not from its adapter",
        "models/load.py",
        "        model = merge_adapter(base, folder)\n        brought",
        "        model = base\n        brought",
        "tests/models/test_adapters.py::test_adapters_that_others_made",
    ),
    Mutation(
        "a reward model's pad is the end token: Hugging Face reads its score one token early",
        "models/classifier.py",
        'token not in (tokenizer.eos_token, "")',
        'token != ""',
        "tests/models/test_classifier.py",
    ),
    Mutation(
        "an answer that was cut gains an end token before it is scored",
        "data/reward_input.py",
        "if not ended and names_special_token(",
        "if ended and not spells(",
        "tests/rewards/test_models.py::test_texts_where_the_tokenizers_differ",
    ),
    Mutation(
        "letters that spell a special token become it: an answer forges the user's next turn",
        "data/reward_input.py",
        "split_special_tokens=True",
        "split_special_tokens=False",
        "tests/rewards/test_models.py::test_texts_where_the_tokenizers_differ",
    ),
    Mutation(
        "a reward model with the policy's tokenizer reads a text in place of what was sampled",
        "rewards/models.py",
        "if token_ids is not None and policy is not None and same_tokens(policy, self.tokenizer):",
        "if token_ids is not None and policy is None:",
        "tests/rewards/test_models.py::test_what_was_sampled_is_scored",
    ),
    Mutation(
        "the policy's tokens are shown to a reward model of another template",
        "rewards/models.py",
        "        and policy.chat_template == other.chat_template\n",
        "",
        "tests/rewards/test_models.py::test_tokenizers_agree_if_ids_mean_the_same",
    ),
    Mutation(
        "an episode longer than the reward model takes scores 0",
        "rewards/models.py",
        "if fit else REWARD_MISSING",
        "if fit else 0.0",
        "tests/rewards/test_models.py",
    ),
    Mutation(
        "weights of an adapter that the model has no place for are dropped in silence",
        "models/adapter_merge.py",
        "return [*lost, *unexpected]",
        "return []",
        "tests/models/test_adapters.py::test_what_cannot_be_is_refused_in_one_line",
    ),
    Mutation(
        "a pair longer than the reward model's context is found in the middle of training",
        "pipeline/stages.py",
        "longest = config.max_length, context(runner.model)\n",
        "longest = (config.max_length,)\n",
        "tests/trainers/test_reward.py::test_rows_longer_than_the_model_takes",
    ),
    Mutation(
        "a critic from a policy whose class has another name values the prompt only",
        "models/load.py",
        'any(kind in known or kind.endswith("ForCausalLM") for kind in kinds)',
        'any(kind.endswith("ForCausalLM") for kind in kinds)',
        "tests/trainers/test_critic.py::test_a_critic_starts_from_any_policy_or_reward_model",
    ),
    Mutation(
        "an adapter of the embedding is merged into the head that is tied to it",
        "models/adapter_merge.py",
        "        base.weight = nn.Parameter(shared.detach().clone())",
        "        pass",
        "tests/models/test_adapters.py::test_what_an_adapter_changes_besides",
    ),
)
