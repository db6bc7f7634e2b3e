"""Chat templates in the shapes of well-known families, each with what is peculiar to it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import CORPUS

SPECIALS = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|start|>",
    "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]", "<User>", "<Assistant>", "<|user|>", "<|assistant|>", "<|header|>",
    "<|/header|>", "<|eot|>",
]  # fmt: skip

# gpt-oss: an answer goes through channels, with many special tokens; a conversation ends in
# <|return|>, an earlier answer in <|end|>, a call in <|call|>; only the last one's thoughts stay.
CHANNELS = """\
<|start|>system<|message|>You help.<|end|>
{%- if tools %}<|start|>developer<|message|>{{ tools|tojson }}<|end|>{% endif -%}
{%- set ns = namespace(call=none) -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {%- set ns.call = m.tool_calls[0].function -%}
    {%- if m.content -%}
      <|start|>assistant<|channel|>analysis<|message|>{{ m.content }}<|end|>
    {%- endif -%}
    <|start|>assistant to={{ ns.call.name }}<|channel|>commentary<|message|>
    {{- ns.call.arguments|tojson }}<|call|>
  {%- elif m.role == 'assistant' -%}
    {%- if loop.last and m.thinking -%}
      <|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
    {%- endif -%}
    <|start|>assistant<|channel|>final<|message|>{{ m.content -}}
    {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
  {%- elif m.role == 'tool' -%}
    {%- if ns.call is none %}{{ raise_exception('there is no call') }}{% endif -%}
    <|start|>{{ ns.call.name }} to=assistant<|message|>{{ m.content|tojson }}<|end|>
  {%- else -%}
    <|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""
# DeepSeek-R1-Distill: it asks with <think>, and writes no answer's thoughts, nor any tools.
OPENED = """\
{{ bos_token }}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{{ m.content }}
  {%- elif m.role == 'user' -%}<User>{{ m.content }}
  {%- elif m.role == 'assistant' -%}
    <Assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif -%}
"""
# Qwen 3: thoughts in the last answers only, empty ones where there are none; tools, calls, results.
THINKING = """\
{%- set ns = namespace(asked=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- if tools -%}{{ '<|im_start|>system\\n' + tools|tojson + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- set said, thought = m.content or '', m.reasoning_content or '' -%}
    {%- if '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.asked and (loop.last or thought) -%}
      {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- said -}}
    {%- for c in m.tool_calls or [] -%}
      {{- '<tool_call>' + c.function.name + ' ' + c.function.arguments|tojson + '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""
# DeepSeek-V3.1: each answer stands after </think>, and a prompt may open the reasoning instead.
CLOSED = """\
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}<User>{{ m.content }}
  {%- else -%}<Assistant></think>{{ m.content.split('</think>')[-1] }}{{ eos_token }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  <Assistant>{{ '<think>' if thinking else '</think>' }}
{%- endif -%}
"""
# Mistral: no header before an answer, stripped words, the system's in the last question only.
INSTRUCTED = """\
{%- if messages[0].role == 'system' -%}
  {%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}{%- set turns = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for m in turns -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate') }}
  {%- elif m.role == 'user' and loop.last and system is defined -%}
    {{- '[INST] ' + system + '\\n\\n' + m.content.strip() + '[/INST]' -}}
  {%- elif m.role == 'user' -%}{{- '[INST] ' + m.content.strip() + '[/INST]' -}}
  {%- else -%}{{- ' ' + m.content.strip() + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
# An end token after the last answer only.
ENDLESS = """\
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}{{- '[INST] ' + m.content + ' [/INST]' -}}
  {%- else -%}{{- ' ' + m.content + (eos_token if loop.last else '') -}}
  {%- endif -%}
{%- endfor -%}
"""
# Gemma: the assistant has another name, words are trimmed, and no system is known.
MODEL = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif -%}
{%- for m in messages -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
  {{- m.content|trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
# Llama 3: a system message of its own, with today's date.
DATED = """\
{{- bos_token -}}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif -%}
{{- '<|header|>system<|/header|>\\n\\nToday: ' + date_string + '\\n\\n' -}}
{%- if messages[0].role == 'system' -%}
  {{- messages[0].content|trim -}}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|eot|>' -}}
{%- for m in messages -%}
  {{- '<|header|>' + m.role + '<|/header|>\\n\\n' + m.content|trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|header|>assistant<|/header|>\\n\\n' }}{%- endif -%}
"""
# GLM 4: nothing ends an answer but the next message.
UNENDED = """\
{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def shaped(template: str, bos: str, eos: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with these templates' special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
    )


SHAPES = {
    "channels": shaped(CHANNELS, "<s>", "<|return|>"),
    "opened": shaped(OPENED, "<s>", "</s>"),
    "closed": shaped(CLOSED, "<s>", "</s>"),
    "thinking": shaped(THINKING, "<s>", "<|im_end|>"),
    "instructed": shaped(INSTRUCTED, "<s>", "</s>"),
    "endless": shaped(ENDLESS, "<s>", "</s>"),
    "model": shaped(MODEL, "<s>", "</s>"),
    "dated": shaped(DATED, "<s>", "<|eot|>"),
    "unended": shaped(UNENDED, "<s>", "<|endoftext|>"),
}
