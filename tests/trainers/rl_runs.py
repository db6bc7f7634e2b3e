"""A tiny RL run, as the tests of the loop make it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gearshift.algorithms.advantages import NEEDS_VALUES
from gearshift.data import Mixture
from gearshift.engine import Engine, EngineConfig
from gearshift.environments.base import TextEnvironment
from gearshift.models.load import ModelConfig, load_policy
from gearshift.models.runner import ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.backend import GenerationBackend
from gearshift.rollouts.collector import Collector
from gearshift.trainers.rl.collect import RewardModel
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.critic import Critic, load_critic
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.rl.methods import CriticConfig
from gearshift.trainers.sft import Rendered
from gearshift.trainers.stage import Stage
from gearshift.types import Trajectory
from tests.device import device
from tests.gyms import SayLetters
from tests.zoo import tiny_model

SMALL: dict[str, Any] = {
    "steps": 4,
    "rollout": {"prompts": 2, "group_size": 4, "max_new_tokens": 8},
    "save_every": 0,
    "update": {"optimizer": {"lr": 1e-2, "warmup": 0}},
    "value": {"optimizer": {"lr": 1e-2}},
}
TINY = ModelConfig(name="tiny", dtype="float32", device=str(device()))


def small(**changes: Any) -> RLConfig:
    """Two prompts, four completions of at most eight tokens."""
    return RLConfig.model_validate(merged(SMALL, changes))


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with the keys of their sections changed; a value net's only where there is one."""
    sections = {
        name: {**section, **changes.get(name, {})} if isinstance(section, dict) else section
        for name, section in settings.items()
    }
    advantage = changes.get("advantage", {}).get("name", "value_baseline")
    if advantage not in NEEDS_VALUES:
        sections.pop("value", None)
    return {**changes, **sections, **{k: v for k, v in changes.items() if not isinstance(v, dict)}}


class OwnReward:
    """The environment's reward as it is."""

    missing: ClassVar[dict[str, float]] = {}
    environment_weight = 1.0
    last_failure = ""

    def begin(self, group: list[Trajectory]) -> None:
        pass

    def __call__(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[Trajectory | None], dict[str, list[float | None]]]:
        return list(trajectories), {"environment": [t.reward for t in trajectories]}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def trainer(
    config: RLConfig,
    folder: Path,
    environment: type[TextEnvironment] = SayLetters,
    seed: int = 0,
    model: Any = None,
    examples: Mixture[Rendered] | None = None,
    reference: Any = None,
    critic: Critic | None = None,
    score: RewardModel | None = None,
    sampled_by: Callable[[Engine], GenerationBackend] | None = None,
) -> RLTrainer:
    """A trainer of the tiny model, ready to `train()`. Its engine samples, or what `sampled_by`
    makes of it.
    """
    engine = Engine(
        model or tiny_model(),
        tiny_tokenizer(),
        EngineConfig(max_num_seqs=8),
        seed=seed,
        generates=sampled_by is None,
    )
    if config.kl.beta > 0 and reference is None:
        reference = load_policy(TINY)
    learnt = isinstance(config.value, CriticConfig)
    if learnt and critic is None:
        critic = load_critic(TINY, None, str, sampled_by is None)
    return RLTrainer(
        config,
        engine,
        Collector(environment, engine.tokenizer, sampled_by(engine) if sampled_by else engine.loop),
        rows=None,
        score=score or OwnReward(),
        stage=Stage("rl", folder, config.steps, seed, config),
        reference=ModelRunner(reference) if reference is not None else None,
        critic=critic,
        examples=examples,
    )
