"""Environments of the `verifiers` package (0.4 or newer) as text environments.

In that package an environment's code asks its agent for a reply; here a policy steps through an
environment. So the environment's code runs as a coroutine that stops at each question until the
next `step`. All copies share one event loop, because the package's environments rely on it that no
other code runs between two awaits (for example when they seed Python's own `random`).

Only this file knows that package, and imports it when an environment is made.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import gymnasium

from gearshift.environments.base import TextEnvironment
from gearshift.errors import ConfigError
from gearshift.types import Message

T = TypeVar("T")


class VerifiersEnvironment(TextEnvironment):
    """A taskset and the environment that plays it, with the policy as its only agent.

    Row i is the i-th task. The reward of an episode is the sum of the rewards that the tasks and
    the environment record, given at its end; `info["metrics"]` has each reward and metric by its
    name. Toolsets, sandboxes and further agents need processes and servers, which are not started
    here.
    """

    def __init__(
        self,
        taskset: str,
        limit: int = 1000,
        config: Mapping[str, Any] | None = None,
        turns: int | None = None,
    ) -> None:
        """`taskset` is the id of an installed taskset (a package that exports it), and `config` has
        its keys. `limit` is how many tasks are read. `turns` is how many answers a conversation has
        at most, for environments that would go on.

        Raises `ConfigError` if the package or the taskset is not there, or needs something that is
        not started here.
        """
        super().__init__()
        with _ONE_LOOP:
            self._loop = _loop()
        loading = _load_there(taskset, limit, json.dumps(dict(config or {})))
        self._vf, self._env, self.tasks = self._wait(loading)
        self.turns = turns
        self._playing: asyncio.Task[None] | None = None
        self._said: asyncio.Queue[list[Message] | _End | Exception] = asyncio.Queue()
        self._reply: asyncio.Future[str] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        row = self.choose(options, len(self.tasks))
        said = self._wait(self._begin(self.tasks[row]))
        if isinstance(said, _End):
            raise ConfigError(f"Task {row} ended before it asked the policy anything.")
        return said[-1]["content"], {"messages": said, "row": row}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when no episode is running, and the errors of the environment's
        code.
        """
        if self._reply is None or self._reply.done():
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        said = self._wait(self._answer(self._reply, action))
        if isinstance(said, _End):
            return "", said.reward, True, False, {"metrics": said.metrics}
        return said[-1]["content"], 0.0, False, False, {"messages": said}

    def close(self) -> None:
        """End the running episode."""
        self._wait(self._stop())

    async def ask(self, said: Sequence[Any]) -> str:
        """The policy's reply to these messages of the package."""
        self._reply = self._loop.create_future()
        text = self._vf.types.content_text
        messages = [{"role": m.role, "content": text(m.content)} for m in said]
        self._said.put_nowait(messages)
        return await self._reply

    def _wait(self, doing: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(doing, self._loop).result()

    async def _begin(self, task: Any) -> list[Message] | _End:
        await self._stop()
        self._playing = asyncio.create_task(self._play(task))
        return await self._next()

    async def _answer(self, reply: asyncio.Future[str], text: str) -> list[Message] | _End:
        reply.set_result(text)
        return await self._next()

    async def _next(self) -> list[Message] | _End:
        """Let the environment's code run until it asks again, or ends."""
        said = await self._said.get()
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

    async def _stop(self) -> None:
        if self._playing:
            self._playing.cancel()
            await asyncio.gather(self._playing, return_exceptions=True)
        self._playing, self._reply, self._said = None, None, asyncio.Queue()


class _End:
    """The result of an episode."""

    def __init__(self, traces: Sequence[Any]) -> None:
        self.reward = float(sum(trace.reward for trace in traces))
        self.metrics: dict[str, float] = {}
        for trace in traces:
            named = {**{k: r and r.score for k, r in trace.rewards.items()}, **trace.metrics}
            self.metrics |= {k: float(v) for k, v in named.items() if v is not None}


class _Player:
    """The package's agent, with the methods that environments call; its replies are the
    policy's.
    """

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
        """A conversation about the task; the task scores it when the caller leaves."""
        from verifiers.v1.utils.decorators import invoke

        interaction = _Interaction(self._at, task, self)
        trace = interaction.trace
        given = {"trace": trace, "runtime": None}
        await invoke(task.setup, given)
        yield interaction
        trace.stop("user_closed")
        await invoke(task.finalize, given)
        await task.score(trace)
        trace.is_completed = trace.ok = True
        self._traces.append(trace)


class _Interaction:
    """The package's interaction: a turn sends a message and returns the policy's reply."""

    def __init__(self, at: VerifiersEnvironment, task: Any, player: _Player) -> None:
        self._at, self._vf, self._task = at, at._vf, task
        vf = self._vf
        made = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key)
        agent = vf.trace.AgentInfo(config=player.spec, name=player.name)
        self.trace = vf.Trace(task=made, agent=agent, state=vf.state.state_cls(type(task))())
        limits = [n for n in (player.spec.max_turns, at.turns) if n is not None]
        self._turns = min(limits, default=None)
        self._over = False

    async def turn(self, message: Any = None) -> Any:
        """Send `message`, or the task's prompt -> a `Segment` with the reply."""
        vf, first = self._vf, not self.trace.nodes
        said = self.trace.task.data.prompt if first and message is None else message
        if said is None:
            raise ValueError("there is nothing to say in this turn")
        if isinstance(said, str):
            said = [vf.UserMessage(content=said)]
        said = [vf.dialects.parse_message(m) if isinstance(m, dict) else m for m in said]
        system = self.trace.task.data.system_prompt
        if first and system:
            said = [vf.SystemMessage(content=system), *said]
        if await self._refused(said):
            return vf.Segment(messages=[], terminated=True)
        for one in said:
            self._keep(one)
        reply = vf.AssistantMessage(content=await self._at.ask(said))
        self._keep(reply, sampled=True)
        response = {"id": "", "created": 0, "model": "", "message": reply, "finish_reason": "stop"}
        self._over = await self._stopped(vf.Response(**response))
        return vf.Segment(messages=[reply])

    def _keep(self, message: Any, sampled: bool = False) -> None:
        nodes = self.trace.nodes
        parent = len(nodes) - 1 if nodes else None
        nodes.append(self._vf.MessageNode(parent=parent, message=message, sampled=sampled))

    async def _refused(self, said: Sequence[Any]) -> bool:
        """Whether the conversation is over, so that these messages are not sent."""
        request = self._vf.Request(messages=[*(n.message for n in self.trace.nodes), *said])
        self._over = (
            self._over
            or self.trace.num_turns == self._turns
            or await self._stopped(self.trace)
            or await self._stopped(request)
        )
        return self._over

    async def _stopped(self, seen: Any) -> bool:
        """Whether one of the task's stop conditions holds, among those that check this kind of
        object.
        """
        from verifiers.v1.session import call_hook, hook_boundary

        given = {type(self.trace): self.trace, type(seen): seen}
        hooks = [
            hook
            for hook in self._task.hooks("stop")
            if hook_boundary(hook, allow_trace=True) is type(seen)
        ]
        return any([await call_hook(hook, given) for hook in hooks])


_ONE_LOOP = threading.Lock()
"""Held while the loop is fetched: without it, two first callers could each make one."""


@lru_cache(1)
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all copies, in a thread of its own. It ignores environments that are
    dropped in the middle of an episode.
    """

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "destroyed" not in context["message"]:
            loop.default_exception_handler(context)

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(tell)
    threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop


async def _load_there(*named: Any) -> tuple[ModuleType, Any, list[Any]]:
    """Load in the loop's thread, because loading draws from Python's own `random` too."""
    return _load(*named)


@lru_cache(8)
def _load(taskset: str, limit: int, config: str) -> tuple[ModuleType, Any, list[Any]]:
    """The package, the environment and its tasks; all copies share them."""
    try:
        import verifiers.v1 as vf
        from verifiers.v1.utils import decorators, loaders
    except ImportError as error:
        raise ConfigError(
            "Environments of verifiers need that package, 0.4 or newer; "
            "run: pip install 'verifiers>=0.4'"
        ) from error
    with _told(taskset):
        keys = {"taskset": {"id": taskset, **json.loads(config)}}
        env = loaders.load_environment(loaders.resolve_env_config(keys))
    roles = [name for name, _ in vf.configs.agent.agent_config_fields(env.config).items()]
    if len(roles) > 1:
        raise ConfigError(
            f"{taskset} has the roles {', '.join(roles)}; a policy can play only one."
        )
    kind, settings = type(env.taskset).task_type(), env.config.taskset
    if kind.NEEDS_CONTAINER or kind.toolsets(settings.task) or env.taskset.toolsets(settings):
        raise ConfigError(f"{taskset} needs a container or tool servers, which are not supported.")
    with _told(taskset):
        tasks = list(itertools.islice(env.taskset, limit))
    if not tasks:
        raise ConfigError(f"The taskset {taskset} has no tasks.")
    hooks = [*tasks[0].hooks("reward"), *tasks[0].hooks("metric")]
    if any(map(_needs_runtime, hooks)) or decorators.discover_decorated(tasks[0], "intercept"):
        raise ConfigError(
            f"{taskset} scores in a sandbox or rewrites messages; neither is supported."
        )
    return vf, env, tasks


@contextmanager
def _told(taskset: str) -> Iterator[None]:
    """Turn an error of loading into one line, also if the user's data are missing."""
    try:
        yield
    except (ImportError, AttributeError, TypeError, ValueError, LookupError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"The taskset {taskset} cannot be loaded: {reason}") from error


def _needs_runtime(hook: Callable[..., Any]) -> bool:
    asked = inspect.signature(hook).parameters.get("runtime")
    return asked is not None and asked.default is inspect.Parameter.empty
