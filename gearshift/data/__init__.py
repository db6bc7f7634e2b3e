"""Raw rows to batches: sources, cleaning, formats, chat templates and mixtures."""

from gearshift.data.chat import (
    render_completion,
    render_conversation,
    render_prompt,
    render_supervised,
    render_text,
    render_turn,
)
from gearshift.data.clean import CleanConfig, CleanReport, clean
from gearshift.data.formats import (
    ChatExample,
    JudgedExample,
    PreferenceExample,
    PromptExample,
    StepsExample,
    TextExample,
    at,
    to_judged,
    to_preference,
    to_prompt,
    to_steps,
    to_supervised,
)
from gearshift.data.mixture import Mixture
from gearshift.data.sources import DataConfig, SourceConfig, load_rows

__all__ = [
    "ChatExample",
    "CleanConfig",
    "CleanReport",
    "DataConfig",
    "JudgedExample",
    "Mixture",
    "PreferenceExample",
    "PromptExample",
    "SourceConfig",
    "StepsExample",
    "TextExample",
    "at",
    "clean",
    "load_rows",
    "render_completion",
    "render_conversation",
    "render_prompt",
    "render_supervised",
    "render_text",
    "render_turn",
    "to_judged",
    "to_preference",
    "to_prompt",
    "to_steps",
    "to_supervised",
]
