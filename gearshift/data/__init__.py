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
    PreferenceExample,
    PromptExample,
    StepwiseExample,
    TextExample,
    UnpairedExample,
    errors_at,
    to_preference,
    to_prompt,
    to_stepwise,
    to_supervised,
    to_unpaired,
)
from gearshift.data.mixture import Mixture
from gearshift.data.sources import DataConfig, SourceConfig, load_rows

__all__ = [
    "ChatExample",
    "CleanConfig",
    "CleanReport",
    "DataConfig",
    "Mixture",
    "PreferenceExample",
    "PromptExample",
    "SourceConfig",
    "StepwiseExample",
    "TextExample",
    "UnpairedExample",
    "clean",
    "errors_at",
    "load_rows",
    "render_completion",
    "render_conversation",
    "render_prompt",
    "render_supervised",
    "render_text",
    "render_turn",
    "to_preference",
    "to_prompt",
    "to_stepwise",
    "to_supervised",
    "to_unpaired",
]
