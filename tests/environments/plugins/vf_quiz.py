"""The sums of `vf_sums` played by an environment of its own: a wrong answer is asked for again."""

# The package is not there for mypy.
# mypy: disable-error-code="misc, untyped-decorator"

import verifiers.v1 as vf
from vf_sums import SUMS, InProcess, SumData, SumTask


class QuizTask(SumTask):
    @vf.stop
    def gave_up(self, response: vf.Response) -> bool:
        return response.message.content == "I give up"

    @vf.stop
    async def rambled(self, trace: vf.Trace) -> bool:
        return len(trace.last_reply) > 40


class QuizConfig(vf.EnvConfig):
    pupil: vf.AgentConfig = vf.AgentConfig(max_turns=3)


class Quiz(vf.Env[QuizConfig]):
    async def run(self, task: QuizTask, agents: vf.Agents) -> None:
        async with agents.pupil.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated and segment.last_reply != task.data.entry["answer"]:
                segment = await interaction.turn([{"role": "user", "content": "No. Again:"}])
        interaction.trace.record_metric("ended", float(segment.terminated))

    async def finalize(self, task: QuizTask, episode: vf.Episode) -> None:
        for trace in episode.traces:
            trace.record_reward("took_part", 1.0, 0.25)


class QuizTaskset(vf.Taskset[QuizTask, vf.TasksetConfig]):
    def load(self) -> list[QuizTask]:
        rows = [SumData(prompt=e["question"], entry=e) for e in SUMS]
        return [QuizTask(row, self.config.task) for row in rows]


__all__ = ["InProcess", "Quiz", "QuizTaskset"]
