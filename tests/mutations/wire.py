"""OpenAI's wire: what a client sends, and what it gets."""

from tests.mutations import Mutation

OPENAI = "tests/serve/test_openai.py"
DOOR = "tests/serve/test_door.py"
TEXT = "tests/serve/test_token_text.py"

MUTATIONS = (
    Mutation(
        "half a character is sent",
        "serve/token_text.py",
        '        if text.endswith("\\ufffd"):\n            return ""\n',
        "",
        TEXT,
    ),
    Mutation(
        "the beginning of a stop string is sent",
        "serve/token_text.py",
        "keep = max(_overlap(text, stop) for stop in self._stops)",
        "keep = 0",
        TEXT,
    ),
    Mutation(
        "a seeded request depends on those before it",
        "serve/answering.py",
        "policy.next_id() if request.seed is None else 0",
        "policy.next_id()",
        f"{DOOR}::test_t6_a_seed_gives_the_same_text_at_any_load",
    ),
    Mutation(
        "all answers to one prompt are the same sample",
        "serve/answering.py",
        "self.params, self.request_id, i) for i",
        "self.params, self.request_id, 0) for i",
        f"{OPENAI}::test_t1_a_chat_by_openais_library",
    ),
    Mutation(
        "log-probs are those of the request's temperature",
        "serve/openai.py",
        "completion.token_ids, completion.raw_logprobs, completion.top_logprobs",
        "completion.token_ids, completion.logprobs, completion.top_logprobs",
        f"{DOOR}::test_t7_log_probs_are_those_of_training",
    ),
    Mutation(
        "tools are dropped without a word",
        "serve/wire.py",
        '    "tools": ([],),\n',
        "",
        f"{OPENAI}::test_t1_errors_are_the_librarys",
    ),
    Mutation(
        "requests wait without a bound",
        "serve/answering.py",
        "if policy.service.waiting >= settings.max_waiting:",
        "if False:",
        OPENAI,
    ),
    Mutation(
        "an old `max_tokens` wins over `max_completion_tokens`",
        "serve/wire.py",
        "self.max_completion_tokens or self.max_tokens",
        "self.max_tokens or self.max_completion_tokens",
        f"{OPENAI}::test_the_fields_reach_the_engine",
    ),
    Mutation(
        "the engine goes on for a stream whose client left",
        "serve/answering.py",
        "            pumps.cancel()\n            await asyncio.wait({pumps})\n",
        "            pass\n",
        f"{OPENAI}::test_a_client_that_leaves_a_stream_ends_it",
    ),
    Mutation(
        "a prefilled answer gets a header of its own",
        "serve/policies.py",
        'if continues or (continues is None and messages[-1]["role"] == "assistant"):',
        "if continues:",
        f"{OPENAI}::test_a_conversation_as_the_model_reads_it",
    ),
    Mutation(
        "a token that does not exist reaches the engine",
        "serve/answering.py",
        "if (worst := max(tokens, default=0)) >= policy.names.count:",
        "if False:",
        f"{OPENAI}::test_completions_of_texts_and_ids",
    ),
)
