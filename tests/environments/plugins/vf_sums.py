"""A taskset, and a harness without a process of its own, as users of verifiers write them: it finds
them by this module's name.
"""

# The package is not there for mypy.
# mypy: disable-error-code="misc, untyped-decorator"

from typing import Any

import httpx
import reasoning_gym
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

SUMS = reasoning_gym.create_dataset("chain_sum", size=8, seed=3)


class SumData(vf.TaskData):
    entry: dict[str, Any]


class SumTask(vf.Task[SumData]):
    async def setup(self, trace: vf.Trace) -> None:
        trace.info["entry"] = self.data.entry

    @vf.reward(weight=2.0)
    async def right(self, task: SumData, trace: vf.Trace) -> float:
        return SUMS.score_answer(trace.last_reply, trace.info["entry"])

    @vf.reward(weight=0.5)
    async def brief(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 8)

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> list[SumTask]:
        rows = [SumData(prompt=e["question"], system_prompt="Add.", entry=e) for e in SUMS]
        return [SumTask(row, self.config.task) for row in rows]


class InProcess(vf.Harness[vf.HarnessConfig]):
    """One call of the model a segment."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        said = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt or [])
        if system:
            said = [vf.SystemMessage(content=system), *said]
        body = {"model": ctx.model, "messages": [message_to_wire(m) for m in said]}
        async with httpx.AsyncClient() as client:
            answer = await client.post(
                f"{endpoint}/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {secret}"},
            )
        return vf.ProgramResult(int(answer.is_error), "", answer.text if answer.is_error else "")


__all__ = ["InProcess", "SumTaskset"]
