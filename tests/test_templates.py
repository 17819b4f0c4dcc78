"""Prompt templates: the ids that transformers' apply_chat_template gives, by the checkpoint's own template; special
tokens from markup alone; what is trained on; and which template a checkpoint has."""

import json
import shutil

import pytest
import tokenizers

import data
from data import Example, Segment
from formats import TEMPLATES, choose
from formats.known import example
from model import UserError
from tests.helpers import BASE, TINY, needs_real, tokenizer_folder

# As published with ChatML, SmolLM2 Instruct, Zephyr, Tulu, Llama 2 Chat, Llama 3 Instruct, Mistral
# Instruct v0.1 and Phi-3; like those of Llama 3.1, Mistral v0.3, Gemma and a reasoning model; and one without tokens.
PUBLISHED = {
    "chatml":
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_e"
        "nd|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "smollm2":
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>"
        "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %"
        "}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% "
        "if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "zephyr":
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content']"
        " + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_t"
        "oken }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_to"
        "ken }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{%"
        ' endfor %}',
    "tulu":
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content"
        "'] + '\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif m"
        "essage['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eo"
        "s_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endi"
        "f %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "llama2":
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message "
        "= messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false"
        " %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % "
        "2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') "
        "}}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + sys"
        "tem_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] "
        "%}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST"
        "]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif"
        ' %}{% endfor %}',
    "llama3":
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header"
        "_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if l"
        'oop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if a'
        "dd_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama3.1-like":
        '{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = "26 Jul 2024" %}\n{%-'
        " endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['conten"
        't\']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = "" %}\n{%'
        '- endif %}\n{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{{- "Cutting Knowledge Date: Dece'
        'mber 2023\\n" }}\n{{- "Today Date: " + date_string + "\\n\\n" }}\n{{- system_message }}\n{{- "<|eot_id|>" '
        "}}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id"
        "|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n "
        "   {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}",
    "mistral-v0.1":
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 =="
        " 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%"
        " endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif "
        "message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_except"
        "ion('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "mistral-v0.3-like":
        '{%- if messages[0]["role"] == "system" %}\n    {%- set system_message = messages[0]["content"] %}\n   '
        ' {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- end'
        'if %}\n{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message["role"] == "user" %}\n '
        '       {%- if loop.last and system_message is defined %}\n            {{- "[INST] " + system_message '
        '+ "\\n\\n" + message["content"] + "[/INST]" }}\n        {%- else %}\n            {{- "[INST] " + message'
        '["content"] + "[/INST]" }}\n        {%- endif %}\n    {%- elif message["role"] == "assistant" %}\n     '
        '   {{- " " + message["content"]|trim + eos_token}}\n    {%- endif %}\n{%- endfor %}',
    "phi3":
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'"
        "] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}"
        "}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% e"
        "ndif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% e"
        'ndif %}',
    "gemma-like":
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported"
        "') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 ="
        "= 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{"
        "% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m"
        "essage['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of"
        "_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "deepseek-think":
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + messag"
        "e['content'] }}{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if "
        "'</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|assistant|"
        ">' + content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }"
        '}{% endif %}',
    "no-specials":
        "{% for message in messages %}{{ '### ' + message['role'] + ': ' + message['content'] + '\n' }}{% endf"
        "or %}{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}",
}
SYSTEM = [{"role": "system", "content": "Be  brief."}]
ONE = [{"role": "user", "content": "What is 2 + 2?\n\n  It's late."}, {"role": "assistant", "content": "4, I say."}]
TWO = [{"role": "user", "content": "Und 北京?"}, {"role": "assistant", "content": "élan {{ x }}"}]
SPACED = [{"role": "user", "content": "\n Hi  "}, {"role": "assistant", "content": "  Ho\n"}]
THINK = [{"role": "user", "content": "think?"}, {"role": "assistant", "content": "<think>hm</think>yes"}]
TALKS = [ONE, SYSTEM + ONE, ONE + TWO, SYSTEM + ONE + TWO + ONE, SPACED, THINK, THINK + ONE,
         [{"role": "system", "content": " \nBe brief.  "}] + SPACED + ONE + SPACED]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of a byte-level tokenizer, one of Llama 2's kind (a space before any text, bytes where there is no
    token), and one of its newer kind (before the first text only)."""
    folder, steps, found = tmp_path_factory.mktemp("tokenizers"), tokenizers.normalizers, {}
    for kind in ("bytes", "prepend", "first"):
        fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
        if kind != "bytes":
            fast = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
            fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()  # no token reaches over a space, as in Llama's
            fast.train_from_iterator(["What is [INST] the [/INST] answer Be brief"] * 3, tokenizers.trainers.BpeTrainer(
                vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"],
                initial_alphabet=[chr(i) for i in range(33, 127)]))
            state = {**json.loads(fast.to_str()), "pre_tokenizer": None}
            for byte in range(256):
                state["model"]["vocab"].setdefault(f"<0x{byte:02X}>", len(state["model"]["vocab"]))
            fast = tokenizers.Tokenizer.from_str(json.dumps(state))
            if kind == "prepend":
                fast.normalizer = steps.Sequence([steps.Prepend("▁"), steps.Replace(" ", "▁")])
            else:
                fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            fast.decoder = tokenizers.decoders.Sequence([
                tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
            fast.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))])
        fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False, rstrip=name == "<|end|>",
                                                       lstrip=name == "<end_of_turn>") for name in (
            "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>",
            "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>")])
        found[kind] = folder / kind
        found[kind].mkdir()
        fast.save(str(found[kind] / "tokenizer.json"))
        (found[kind] / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))
    return found


def bare(talk):
    said = [Segment(m["content"], m["role"], m["role"] == "assistant") for m in talk]
    return Example("", said, gold=talk[-1]["content"])


def tokenized(folder, name, talk):
    """(ids, labels, tokens of the prompt, the Tokenizer) of a talk by a template."""
    tokenizer = data.Tokenizer.from_pretrained(folder)
    template, _ = choose(name, tokenizer, folder)
    return *tokenizer.encode_segments(template.apply(bare(talk)).segments), tokenizer


@pytest.mark.parametrize("kind", ["bytes", "prepend", "first"])
@pytest.mark.parametrize("chosen", [*PUBLISHED.values(), *TEMPLATES], ids=[*PUBLISHED, *TEMPLATES])
def test_ids_are_those_of_transformers(folders, kind, chosen):
    """Of each answer of each talk, of its prompt, and of a question that waits for an answer; those of our own template
    of a name are the published one's. What follows the end of the last answer, such as a line break, is left out; where
    nothing ends it, EOS is put there."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
    tokenizer = data.Tokenizer.from_pretrained(folders[kind])
    template, _ = choose(chosen, tokenizer, folders[kind])
    ids_of = lambda talk: tokenizer.encode_segments(template.apply(bare(talk)).segments)
    render = lambda talk, **more: theirs.apply_chat_template(
        talk, chat_template=PUBLISHED.get(chosen, template.exported()), tokenize=True, return_dict=False, **more)
    for talk in TALKS:
        for end in [i + 1 for i, message in enumerate(talk) if message["role"] == "assistant"]:
            try:
                wanted = render(talk[:end])
            except Exception:  # the template has no system text
                with pytest.raises(UserError, match="the chat template refuses the conversation"):
                    ids_of(talk[:end])
                continue
            ids, labels, prompt = ids_of(talk[:end])
            assert labels == [-100] * prompt + ids[prompt:]
            shown = ids[:-1] if chosen == PUBLISHED["no-specials"] else ids
            assert wanted[: len(shown)] == shown, (talk[:end], theirs.decode(wanted), theirs.decode(ids))
            assert len(wanted) - len(shown) <= 2
            asked = render(talk[: end - 1], add_generation_prompt=True)
            assert ids_of(talk[: end - 1])[0] == asked
            if chosen != PUBLISHED["mistral-v0.3-like"]:  # its system text moves with the last question
                assert ids[:prompt] == asked, (talk[:end], theirs.decode(asked), theirs.decode(ids[:prompt]))


@needs_real
def test_special_tokens_are_found_where_a_tokenizer_looks_for_them_in_normalized_text():
    """Behind a letter, in front of one and behind a space, as transformers' LlamaTokenizer has it."""
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TINY)
    for text in ("late.<|end_story|>", "<|start_story|>hi", "a <|end_story|>", "<|start_story|>a b<|end_story|>"):
        found = data.Tokenizer.from_pretrained(TINY).encode_segments([Segment(text)])[0]
        assert found == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name, wanted", [
    ("chatml", "4, I say.<|im_end|>"), ("smollm2", "4, I say.<|im_end|>"), ("llama2", " 4, I say. </s>"),
    ("llama3", "4, I say.<|eot_id|>"), ("zephyr", "4, I say.</s>"), ("phi3", "4, I say.<|end|>"),
    ("gemma-like", "4, I say.<end_of_turn>"), ("no-specials", "4, I say.</s>"), ("plain", " 4, I say.</s>"),
    ("alpaca", "4, I say.</s>")])
def test_trained_on_is_the_last_answer_with_the_end_of_its_turn(folders, name, wanted):
    _, labels, _, tokenizer = tokenized(folders["bytes"], PUBLISHED.get(name, name), TWO + ONE)
    trained = [label for label in labels if label != -100]
    assert tokenizer.fast.decode(trained, skip_special_tokens=False) == wanted
    assert trained[-1] in tokenizer.stop_ids


def test_each_answer_of_a_talk_is_trained_on_with_its_own_prompt(folders):
    tokenizer = data.Tokenizer.from_pretrained(folders["bytes"])
    template, _ = choose("chatml", tokenizer, folders["bytes"])
    talk = bare(ONE + TWO)
    first, second = template.answers(talk)
    assert first.segments == template.apply(bare(ONE)).segments and second.segments == template.apply(talk).segments
    assert sum(s.trained and s.role == "assistant" for s in second.segments) == 1
    talk.segments[1].trained = False  # an answer that is not to be trained on
    assert [one.segments for one in template.answers(talk)] == [second.segments]


def test_alpacas_two_prompts_are_the_published_ones():
    template, _ = choose("alpaca", data.Tokenizer.from_pretrained(BASE), BASE)
    opening = lambda user, given="": "".join(
        s.text for s in template.apply(example((user, "A"), given=given)).segments if not s.trained)
    assert opening("Add.", "1 2") == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n")
    assert opening("Say {x}.") == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay {x}.\n\n### Response:\n")


@pytest.mark.parametrize("chosen", [*PUBLISHED.values(), *TEMPLATES], ids=[*PUBLISHED, *TEMPLATES])
def test_what_somebody_says_never_becomes_a_special_token(folders, chosen):
    special = set(data.Tokenizer.from_pretrained(folders["bytes"]).fast.get_added_tokens_decoder())
    count = lambda text: sum(i in special for i in tokenized(folders["bytes"], chosen, [
        {"role": "user", "content": text}, {"role": "assistant", "content": text}])[0])
    for text in ("<|im_end|>", "a</s>b <s> c<|eot_id|>", "[INST] x [/INST]", "<|end|><end_of_turn>"):
        assert count(text) == count("x"), text


def test_a_token_that_is_not_marked_special_is_so_in_markup_only(tmp_path):
    """Some tokenizers have ChatML's tokens as ordinary added ones, which any text would produce."""
    folder = tokenizer_folder(tmp_path / "x")
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens(["<|im_start|>", "<|im_end|>"])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "config.json").unlink()
    ids = tokenized(folder, "chatml", [{"role": "user", "content": "<|im_end|>"}, ONE[1]])[0]
    assert [ids.count(fast.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")] == [2, 2]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "several", "chat_template.jinja", "chat_template.json"])
def test_the_checkpoint_says_its_template(folders, tmp_path, where):
    text = PUBLISHED["smollm2"]
    config = json.loads((folders["bytes"] / "tokenizer_config.json").read_text())
    if where == "several":
        config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    elif where == "tokenizer_config.json":
        config["chat_template"] = text
    elif where == "chat_template.jinja":
        (tmp_path / where).write_text(text)
    else:
        (tmp_path / where).write_text(json.dumps({"chat_template": text}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(folders["bytes"] / "tokenizer.json", tmp_path)
    template, source = choose("auto", data.Tokenizer.from_pretrained(tmp_path), tmp_path)
    assert template.name == text and source == "the checkpoint's"
    file = tmp_path / "mine.jinja"
    file.write_text(PUBLISHED["zephyr"])
    assert choose(str(file), data.Tokenizer.from_pretrained(tmp_path), tmp_path)[0].name == PUBLISHED["zephyr"]
    assert choose("auto", data.Tokenizer.from_pretrained(folders["bytes"]), folders["bytes"])[0].name == "plain"


@pytest.mark.parametrize("asked, words", [
    ("chatml", "needs the token '<|im_start|>'"), ("chatty", "expected auto, a file, or one of plain"),
    ("{% if %}", "the chat template cannot be read"), ("{{ messages[9].content + 'x' }}", "refuses the conversation")])
def test_templates_that_do_not_work_are_one_line(asked, words):
    with pytest.raises(UserError) as error:
        choose(asked, data.Tokenizer.from_pretrained(BASE), BASE)
    assert words in str(error.value) and "\n" not in str(error.value)
