"""The score server, secrets, and what a terminal is shown."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "the server's key goes to every address",  # in place of the entry of this name
        "rewards/http.py",
        "if key is None and is_loopback(host):",
        "if key is None:",
        "tests/serve/test_score.py::test_keys_go_to_the_host_they_are_for",
    ),
    Mutation(
        "a client that sends a byte now and then keeps its thread",
        "serve/score.py",
        "        left = self._until - time.monotonic()\n",
        "        left = 0.3\n",
        "tests/serve/test_score.py::test_a_byte_now_and_then_is_no_request",
    ),
    Mutation(
        "a page in a browser may ask a score server under a name that leads here",
        "serve/score.py",
        "if not key and not all(map(is_local, [*hosts, *named])):",
        "if False:",
        "tests/serve/test_score.py",
    ),
    Mutation(
        "who waits for a busy model waits for ever",
        "serve/score.py",
        "one_at_a_time.acquire(timeout=self.timeout)",
        "one_at_a_time.acquire(timeout=20)",
        "tests/serve/test_score.py::test_no_client_holds_up_another",
    ),
    Mutation(
        "clients of a score server are without number",
        "serve/score.py",
        "if self._places.acquire(blocking=False):",
        "if True:",
        "tests/serve/test_score.py::test_one_client_too_many_is_told_to_come_again",
    ),
    Mutation(
        "an address in a recipe may hold a password or a token",
        "runtime/config.py",
        "        _check_no_secret(tree)\n",
        "",
        "tests/runtime/test_config.py",
    ),
    Mutation(
        "a server's words bring back the key that it was sent",
        "runtime/urls.py",
        'text = text.replace(secret, "[secret]")',
        "pass",
        "tests/runtime/test_urls.py",
    ),
    Mutation(
        "a metric's name holds an address with its query",
        "rewards/composite.py",
        "self.functions.append((redact_urls(s.source), ",
        "self.functions.append((s.source, ",
        "tests/rewards/test_composite.py"
        "::test_a_dead_address_leaves_the_episode_out_and_is_counted",
    ),
    Mutation(
        "a model is asked without the system message that its recipe trained it with",
        "cli/talk.py",
        'task.system or getattr(recipe.task, "system", None)',
        "task.system",
        "tests/serve/test_chat.py::test_a_run_is_asked_with_the_system_message_of_its_recipe",
    ),
    Mutation(
        "a terminal obeys what a model writes in a chat",
        "serve/chat.py",
        'echo(piece, end="")',
        'print(piece, end="")',
        "tests/reliability/test_terminals.py::test_nor_in_a_chat",
    ),
    Mutation(
        "line separators and marks of direction reach a terminal",
        "runtime/terminal.py",
        r"\u2028-\u202e\u2066-\u206f",
        r"\u2028-\u2029",
        "tests/runtime/test_terminal.py",
    ),
    Mutation(
        "the report carries no policy, and styles in every tag",
        "pipeline/report.py",
        "_sealed(printable(page))",
        "printable(page)",
        "tests/pipeline/test_report.py",
    ),
)
