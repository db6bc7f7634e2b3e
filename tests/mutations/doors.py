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
        "a client that sends a byte now and then keeps its connection",
        "serve/listen.py",
        "        if self.conn.their_state is not IDLE:\n",
        "        if True:\n",
        "tests/serve/test_app.py::test_a_head_in_drops_is_no_request",
    ),
    Mutation(
        "a body may take any time",
        "serve/exchange.py",
        "asyncio.timeout(self._settings.patience)",
        "asyncio.timeout(20)",
        "tests/serve/test_score.py::test_a_body_in_drops_is_no_request",
    ),
    Mutation(
        "a page of another site may ask under a name that leads here",
        "serve/guard.py",
        "        _check_host(scope, headers, settings)\n",
        "        pass\n",
        "tests/serve/test_app.py",
    ),
    Mutation(
        "a page of another site may change something",
        "serve/guard.py",
        "    if foreign or (",
        "    if (",
        "tests/serve/test_app.py",
    ),
    Mutation(
        "a cookie is enough for a call that changes something",
        "serve/guard.py",
        'if scope["method"] not in READS and (by_cookie or path.startswith("/api/")):',
        "if False:",
        "tests/serve/test_app.py",
    ),
    Mutation(
        "a client that does not read holds its answer in memory for ever",
        "serve/listen.py",
        "        self._unread = self.loop.call_later("
        "self.settings.patience, self.transport.abort)\n",
        "",
        "tests/serve/test_app.py::test_t14_a_client_that_does_not_read_is_dropped",
    ),
    Mutation(
        "the work for a client that left goes on",
        "serve/exchange.py",
        "            if left:\n                work.cancel()\n",
        "",
        "tests/serve/test_app.py::test_a_client_that_leaves_ends_its_work",
    ),
    Mutation(
        "a chunked body has no bound",
        "serve/exchange.py",
        "                    if size > most:\n",
        "                    if False:\n",
        "tests/serve/test_app.py::test_chunked_bodies_have_the_same_bound",
    ),
    Mutation(
        "a request waits for a busy model for ever",
        "serve/score.py",
        "asyncio.wait_for(one_at_a_time.acquire(), settings.patience)",
        "asyncio.wait_for(one_at_a_time.acquire(), 20)",
        "tests/serve/test_score.py::test_no_client_holds_up_another",
    ),
    Mutation(
        "clients of a server are without number",
        "serve/listen.py",
        "        if len(self.connections) > self.settings.connections:\n",
        "        if False:\n",
        "tests/serve/test_app.py::test_t27_one_client_too_many_is_refused",
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
