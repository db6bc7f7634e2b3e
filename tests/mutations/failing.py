"""Rewards, environments and addresses that fail."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a reward function is given the run's own lists",
        "rewards/functions.py",
        "own = {key: _copy(value) for key, value in {**columns, **given}.items()}",
        "own = {**columns, **given}",
        "tests/rewards/test_functions.py::test_a_function_may_change_its_arguments_and_no_other_sees_it",
    ),
    Mutation(
        "complex numbers lose their imaginary part",
        "rewards/functions.py",
        'plain = value.item() if hasattr(value, "item") else value',
        "plain = value",
        "tests/rewards/test_functions.py::test_wrong_answers_name_the_function",
    ),
    Mutation(
        "a dict's keys are rewards",
        "rewards/functions.py",
        "isinstance(result, str | bytes | Mapping | Set)",
        "isinstance(result, str | bytes)",
        "tests/rewards/test_functions.py::test_wrong_answers_name_the_function",
    ),
    Mutation(
        "a function's KeyboardInterrupt ends the run",
        "rewards/functions.py",
        "if isinstance(error, KeyboardInterrupt) and main:",
        "if isinstance(error, KeyboardInterrupt):",
        "tests/rewards/test_functions.py::test_what_looks_like_ctrl_c_is_so_only_in_the_main_thread",
    ),
    Mutation(
        "a hung source is asked for each group of a rollout",
        "rewards/composite.py",
        "if self._silent[i] >= _MAX_TIMEOUTS:",
        "if self._silent[i] >= 99:",
        "tests/rewards/test_composite.py::test_an_address_that_takes_its_whole_time_is_not_asked_for_ever",
    ),
    Mutation(
        "the first group at which a function raises ends the run",
        "rewards/composite.py",
        "if error and self._raised[i] >= _MAX_FAILURES and name not in self._worked:",
        "if error and name not in self._worked:",
        "tests/rewards/test_composite.py::test_a_function_that_raises_at_one_group_loses_that_group",
    ),
    Mutation(
        "a request that is over its time goes on",
        "runtime/worker_threads.py",
        "            _stop(thread.ident)\n",
        "            pass\n",
        "tests/rewards/test_http_client.py::test_an_answer_that_drips_ends_with_its_time",
    ),
    Mutation(
        "the key goes to a proxy",
        "rewards/http_client.py",
        'if scheme == "https"}',
        "if scheme}",
        "tests/rewards/test_http_client.py::test_a_key_goes_to_no_proxy",
    ),
    Mutation(
        "a call takes the run to another folder",
        "runtime/worker_threads.py",
        "            error = raised\n        self._come_back()\n",
        "            error = raised\n",
        "tests/rewards/test_composite.py::test_a_function_that_hangs_loses_its_group_and_is_not_asked_for_ever",
    ),
    Mutation(
        "an environment that died while idle costs an episode",
        "environments/worker_processes.py",
        "if self._connection is None or self._connection.poll():",
        "if self._connection is None:",
        "tests/environments/test_worker_processes.py::test_one_that_died_while_it_was_idle_costs_nothing",
    ),
    Mutation(
        "an environment that hangs outlives a run that was killed",
        "environments/worker_processes.py",
        "    end_with_parent()\n    connection.send(os.getpid())",
        "    connection.send(os.getpid())",
        "tests/environments/test_worker_processes.py::test_none_is_left_when_the_run_is_gone",
    ),
    Mutation(
        "an environment that cannot be made ends the run",
        "rollouts/environment_pool.py",
        "            if not self._made_one:\n                raise\n",
        "            raise\n",
        "tests/rollouts/test_collector.py::test_an_environment_that_cannot_be_made_costs_its_episode",
    ),
    Mutation(
        "an endless reply of a judge is read",
        "rewards/judge_marks.py",
        "if len(text) > _MAX_LENGTH:",
        "if False:",
        "tests/rewards/test_judge_marks.py::test_an_endless_reply_has_no_mark",
    ),
    Mutation(
        "each lost episode leaves a process behind",
        "rollouts/environment_pool.py",
        "            environment.close()\n            self",
        "            self",
        "tests/environments/test_worker_processes.py::test_the_process_of_an_episode_that_was_lost_ends",
    ),
)
