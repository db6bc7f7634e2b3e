"""Small tokenizers with merges, one for each way in which real chat templates differ."""

from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|endoftext|>"]
CORPUS = [
    "hello there, what is the weather like today?\n\n    return the answer\n\tin two lines\n",
    "assistant user system assistant user the the there there hello hello\n\n\n        indented\n",
]


@dataclass(frozen=True)
class Family:
    """A tokenizer, and what stands before and after an answer in its template's text."""

    tokenizer: PreTrainedTokenizerFast
    opening: str
    end: str


def bpe(
    bos: str, eos: str, pad: str, template: str, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few lines, so that newlines and spaces merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
    )


# As SmolLM2's: BOS opens every turn, EOS = pad ends it, and a system message is added at the front.
SMOLLM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 2's: BOS before each exchange, no header that a prompt could ask with.
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('system is not known.') }}{% endif %}{% endfor %}"
)
# As Phi 3's: the end token is not EOS, and EOS ends a whole conversation only.
PHI = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# As Qwen 3's: the last answer gets a place to think, earlier ones do not.
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER = "<|im_start|>assistant\n"
FAMILIES = {
    "smollm": Family(bpe("<|im_start|>", "<|im_end|>", "<|im_end|>", SMOLLM), HEADER, "<|im_end|>"),
    "llama": Family(bpe("<s>", "</s>", "<unk>", LLAMA, adds_bos=True), "[/INST]", "</s>"),
    "phi": Family(bpe("<s>", "<|endoftext|>", "<|endoftext|>", PHI), HEADER, "<|end|>"),
    "qwen": Family(bpe("<s>", "<|im_end|>", "<|endoftext|>", QWEN), HEADER, "<|im_end|>"),
}


@pytest.fixture(params=FAMILIES, scope="session")
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]
