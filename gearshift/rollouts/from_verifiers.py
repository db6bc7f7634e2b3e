"""Environments of the `verifiers` package (0.4 or newer) as text environments.

There an environment's code asks its agent for a reply; here a policy steps through an environment.
So the environment's code runs as a coroutine that stops at each question until the next `step`. A
room of its own because nothing else knows that package, which is imported when one is made.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import gymnasium

from gearshift.errors import ConfigError
from gearshift.rollouts.environment import TextEnvironment
from gearshift.types import Message


class VerifiersEnvironment(TextEnvironment):
    """A taskset and the environment that plays it, with the policy as its one agent.

    Row i is the i-th task. The rewards that the tasks and the environment record are the episode's,
    given at its end; `info["metrics"]` has each reward and metric by its name. Toolsets, sandboxes
    and further agents need processes and servers that are not started here.
    """

    def __init__(
        self, taskset: str, limit: int = 1000, config: Mapping[str, Any] | None = None
    ) -> None:
        """`taskset`: the id of an installed taskset, a package that exports it; `config`: its keys;
        `limit`: the first tasks that are read.

        Raises `ConfigError` if the package or the taskset is not there, or needs what is not
        started here.
        """
        super().__init__()
        self._vf, self._env, self.tasks = _load(taskset, limit, json.dumps(dict(config or {})))
        self._loop = asyncio.new_event_loop()
        self._playing: asyncio.Task[None] | None = None
        self._said: asyncio.Queue[list[Message] | _End | Exception] = asyncio.Queue()
        self._reply: asyncio.Future[str] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        row = self.choose(options, len(self.tasks))
        self._stop()
        self._playing = self._loop.create_task(self._play(self.tasks[row]))
        said = self._next()
        if isinstance(said, _End):
            raise ConfigError(f"Task {row} ended before it asked the policy anything.")
        return said[-1]["content"], {"messages": said, "row": row}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when no episode runs, and what the environment's code raises."""
        if self._reply is None or self._reply.done():
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        self._reply.set_result(action)
        said = self._next()
        if isinstance(said, _End):
            return "", said.reward, True, False, {"metrics": said.metrics}
        return said[-1]["content"], 0.0, False, False, {"messages": said}

    def close(self) -> None:
        """End what runs."""
        if not self._loop.is_closed():
            self._stop()
            self._loop.close()

    async def ask(self, said: Sequence[Any]) -> str:
        """What the policy replies to these of the package's messages."""
        self._reply = self._loop.create_future()
        text = self._vf.types.content_text
        messages = [{"role": m.role, "content": text(m.content)} for m in said]
        self._said.put_nowait(messages)
        return await self._reply

    def _next(self) -> list[Message] | _End:
        """Let the environment's code run until it asks again, or ends."""
        said = self._loop.run_until_complete(self._said.get())
        if isinstance(said, Exception):
            raise said
        return said

    async def _play(self, task: Any) -> None:
        vf, env = self._vf, self._env
        traces: list[Any] = []
        try:
            made = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key)
            episode = vf.Episode(env=vf.EnvInfo(id=env.config.env_id), task=made)
            agents = vf.Agents(env.config, lambda name, spec: _Player(self, name, spec, traces))
            await env.setup(agents)
            await env.run(task, agents)
            episode.traces.extend(traces)
            await env.finalize(task, episode)
            self._said.put_nowait(_End(traces))
        except Exception as error:
            self._said.put_nowait(error)

    def _stop(self) -> None:
        if self._playing:
            self._playing.cancel()
            self._loop.run_until_complete(asyncio.gather(self._playing, return_exceptions=True))
        self._playing, self._reply, self._said = None, None, asyncio.Queue()


class _End:
    """What an episode came to."""

    def __init__(self, traces: Sequence[Any]) -> None:
        self.reward = float(sum(trace.reward for trace in traces))
        self.metrics: dict[str, float] = {}
        for trace in traces:
            named = {**{k: r and r.score for k, r in trace.rewards.items()}, **trace.metrics}
            self.metrics |= {k: float(v) for k, v in named.items() if v is not None}


class _Player:
    """The package's agent, as far as environments call it: its replies are the policy's."""

    def __init__(self, at: VerifiersEnvironment, name: str, spec: Any, traces: list[Any]) -> None:
        self.name, self.spec, self.trainable = name, spec, True
        self._at, self._traces = at, traces

    async def run(self, task: Any, **_: Any) -> Any:
        """One reply to the task's prompt -> its trace."""
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @asynccontextmanager
    async def interaction(self, task: Any, **_: Any) -> AsyncIterator[_Interaction]:
        """A conversation about the task, scored by it when the caller leaves."""
        interaction = _Interaction(self._at, task, self)
        trace = interaction.trace
        await task.setup(trace, None)
        yield interaction
        trace.stop("user_closed")
        await task.finalize(trace, None)
        await task.score(trace)
        trace.is_completed = trace.ok = True
        self._traces.append(trace)


class _Interaction:
    """The package's interaction: a turn says something and returns what the policy replied."""

    def __init__(self, at: VerifiersEnvironment, task: Any, player: _Player) -> None:
        self._at, self._vf, self._task = at, at._vf, task
        vf = self._vf
        made = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key)
        agent = vf.trace.AgentInfo(config=player.spec, name=player.name)
        self.trace = vf.Trace(task=made, agent=agent)
        self._over = False

    async def turn(self, message: Any = None) -> Any:
        """Say `message`, or the task's prompt -> a `Segment` with the reply."""
        vf, first = self._vf, not self.trace.nodes
        said = self.trace.task.data.prompt if first and message is None else message
        if said is None:
            raise ValueError("there is nothing to say in this turn")
        if self._over:
            return vf.Segment(messages=[], terminated=True)
        if isinstance(said, str):
            said = [vf.UserMessage(content=said)]
        said = [vf.types.parse_message(m) if isinstance(m, dict) else m for m in said]
        system = self.trace.task.data.system_prompt
        if first and system:
            said = [vf.SystemMessage(content=system), *said]
        for one in said:
            self._keep(one)
        reply = vf.AssistantMessage(content=await self._at.ask(said))
        self._keep(reply, sampled=True)
        self._over = await self._stopped()
        return vf.Segment(messages=[reply])

    def _keep(self, message: Any, sampled: bool = False) -> None:
        nodes = self.trace.nodes
        parent = len(nodes) - 1 if nodes else None
        nodes.append(self._vf.MessageNode(parent=parent, message=message, sampled=sampled))

    async def _stopped(self) -> bool:
        """Whether one of the task's stop conditions holds."""
        from verifiers.v1.utils.decorators import invoke_all

        given = {"task": self._task.data, "trace": self.trace}
        return any(await invoke_all(self._task.hooks("stop"), given))


@lru_cache(8)
def _load(taskset: str, limit: int, config: str) -> tuple[ModuleType, Any, list[Any]]:
    """The package, the environment and its tasks, once for all copies side by side."""
    try:
        import verifiers.v1 as vf
        from verifiers.v1.utils import loaders
    except ImportError as error:
        raise ConfigError(
            "Environments of verifiers need that package, 0.4 or newer; "
            "run: pip install 'verifiers>=0.4'"
        ) from error
    try:
        keys = {"taskset": {"id": taskset, **json.loads(config)}}
        env = loaders.load_environment(loaders.resolve_env_config(keys))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"The taskset {taskset} cannot be loaded: {told}") from error
    roles = [name for name, _ in vf.configs.agent.agent_config_fields(env.config).items()]
    if len(roles) > 1:
        raise ConfigError(f"{taskset} is played by {', '.join(roles)}; a policy can be only one.")
    kind, settings = type(env.taskset).task_type(), env.config.taskset
    if kind.NEEDS_CONTAINER or kind.toolsets(settings.task) or env.taskset.toolsets(settings):
        raise ConfigError(f"{taskset} needs a container or tool servers, which are not started.")
    tasks = list(itertools.islice(env.taskset, limit))
    if not tasks:
        raise ConfigError(f"The taskset {taskset} has no tasks.")
    return vf, env, tasks
