"""Chat templates of the kinds that there are, each with the tokens that it needs."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

THINKING = (
    "{%- set ns = namespace(asked=-1) -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif -%}"
    "{%- endfor -%}"
    "{%- if tools %}{{ '<|im_start|>system\n# Functions\n' }}"
    "{%- for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{- 'Call one within <tool_call></tool_call>.<|im_end|>\n' }}{% endif -%}"
    "{%- for m in messages -%}"
    "{%- set said = m.content -%}"
    "{%- if m.role == 'assistant' and loop.index0 < ns.asked -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{%- if m.role == 'tool' -%}"
    "{{- '<|im_start|>user\n<tool_response>\n' + said + '\n</tool_response>' }}"
    "{%- else -%}"
    "{{- '<|im_start|>' + m.role + '\n' + said }}"
    "{%- endif -%}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}"
)
"""It drops what was thought once the user speaks again, as Qwen3's does."""

FORGETS = THINKING.replace("'</think>'", "'\ufffd'")
"""It takes for thought what ends with bytes that are no letters. A random model says
many of these, and no tags."""

HEADERS = (
    "{{- '<|begin_of_text|>' }}"
    "{%- for m in messages -%}"
    "{%- set role = 'ipython' if m.role == 'tool' else m.role -%}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
    "{%- if loop.first and tools -%}"
    "{%- for tool in tools %}{{ tool | tojson + '\n\n' }}{% endfor -%}"
    '{{- \'Respond with {"name": ..., "parameters": ...}.\n\n\' }}'
    "{%- endif -%}"
    "{{- (m.content | tojson if m.role == 'tool' else m.content | trim) }}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif -%}"
)
"""It names a tool's answer otherwise, and quotes it, as Llama 3's does."""

ALTERNATING = (
    "{%- for m in messages -%}"
    "{%- if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif -%}"
    "{{- '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif -%}"
)
"""It knows neither a system message nor tools, as Gemma's does."""

_MARK = re.compile(r"<\|\w+\|>|<｜[^｜]+｜>|<\w+_of_turn>|\[/?[A-Z_]+\]")


def tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Bytes and some longer pieces, so that one text has many spellings in tokens; the
    template's own marks are special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["Say the number, then the word: one two three, four and five."] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    marks = sorted({*_MARK.findall(chat_template)})
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<｜end▁of▁sentence｜>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=next((end for end in ends if end in marks), "<|end|>"),
        additional_special_tokens=marks,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
