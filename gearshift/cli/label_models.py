"""The policies that answer the prompts of a labelling."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import anyio.to_thread

from gearshift.data.chat import render_prompt
from gearshift.data.formats import PromptExample
from gearshift.data.labels import item_id
from gearshift.data.text import decode
from gearshift.engine import Engine
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.models.made import made_of
from gearshift.pipeline.policy import find_policy
from gearshift.serve.label_items import Answer, Source
from gearshift.tasks.registry import get_task
from gearshift.types import SamplingParams


class Policy:
    """A policy that answers one prompt after another."""

    def __init__(self, name: str, seed: int) -> None:
        """`name`: a run's folder, a stage's folder, or any model."""
        found, recipe = find_policy(name)
        config = recipe.model if recipe else ModelConfig()
        self._engine = Engine(load_policy(config, found), load_tokenizer(config, found), seed=seed)
        task = get_task(recipe.task.name) if recipe and recipe.task else None
        own = getattr(recipe.task, "system", None) if recipe else None
        self.system = (task.system if task else None) or own
        """The system message of the run's task; None where it has none."""
        made = json.dumps(made_of(found), sort_keys=True).encode()
        # The last two parts name a run and its stage, and no folder of this machine.
        self._source = {
            "model": "/".join(Path(found).parts[-2:]),
            "weights_sha": hashlib.blake2b(made, digest_size=4).hexdigest(),
        }
        self._seed, self._lock = seed, threading.Lock()

    async def answer(
        self, prompt: PromptExample, count: int, temperature: float, tokens: int
    ) -> list[tuple[Answer, Source]]:
        """So many answers, each with where it comes from."""
        most = min(tokens, max(1, self._engine.max_length // 2))
        params = SamplingParams(n=count, temperature=temperature, max_new_tokens=most)
        # The same prompt gets the same answers, whenever it is asked.
        request = int(item_id(prompt.prompt, [], prompt.options), 16) >> 1
        sampling = {"temperature": temperature, "max_new_tokens": most, "seed": self._seed}

        def generate() -> list[tuple[Answer, Source]]:
            engine, found = self._engine, list[tuple[Answer, Source]]()
            ids = render_prompt(engine.tokenizer, prompt.prompt, prompt.options)
            with self._lock, engine.generating():
                [completions] = engine.generate([ids], params, [request])
            for i, completion in enumerate(completions):
                text = decode(engine.tokenizer, completion.token_ids, skip_special_tokens=True)
                if not text.strip():
                    raise ValueError("an answer has no words")
                source = {**self._source, "version": engine.weights_version, "sampling": sampling}
                found.append((text, {**source, "request_id": request, "sample": i}))
            return found

        return await anyio.to_thread.run_sync(generate, abandon_on_cancel=True)
