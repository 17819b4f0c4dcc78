"""Prompt templates: the ids that transformers' apply_chat_template gives, special tokens from markup alone, and which
template a checkpoint says."""

import json
import shutil

import pytest
import tokenizers

import data
from formats import TEMPLATES, choose, named
from formats.known import conversation, example
from model import UserError
from tests.helpers import BASE, REAL, TINY, here, needs_real, tokenizer_folder

# As published with Llama 2 Chat, Llama 3 Instruct, Zephyr and TinyLlama Chat, SmolLM Instruct.
PUBLISHED = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
              "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
              "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0)"
              " %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
              "{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
              "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = "
              "message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
              "content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' "
              "+ eos_token }}{% endif %}{% endfor %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
              "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
              "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
              "{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] "
              "+ eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + "
              "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + "
              "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
              "{% endif %}\n{% endfor %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
              "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
              "{% endif %}",
}
SYSTEM = [{"role": "system", "content": "Be  brief."}]
ONE = [{"role": "user", "content": "What is 2 + 2?\n\n  It's late."}, {"role": "assistant", "content": "4, I say."}]
TWO = [{"role": "user", "content": "Und 北京?"}, {"role": "assistant", "content": "élan"}]
TALKS = [ONE, SYSTEM + ONE, ONE + TWO, SYSTEM + ONE + TWO + ONE]
SPACED = [{"role": "user", "content": "\n Hi  "}, {"role": "assistant", "content": "  Ho\n"}]  # for those that trim
SPACED_SYSTEM = [{"role": "system", "content": " \nBe brief.  "}] + SPACED + SPACED


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of a byte-level tokenizer, one of Llama 2's kind (a space before any text, bytes where there is no
    token), one of its newer kind (before the first text only), and a real one where it is at hand."""
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
        fast.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in (
            "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")])
        found[kind] = folder / kind
        found[kind].mkdir()
        fast.save(str(found[kind] / "tokenizer.json"))
        (found[kind] / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))
    return found | ({"real": TINY} if REAL.is_dir() else {})


def ours(folder, name, talk):
    """Encoded messages."""
    tokenizer = data.Tokenizer.from_pretrained(folder)
    choose(name, tokenizer, folder)
    return data.encode([named(name).apply(conversation(talk, "messages"))], tokenizer, [""])[0]


@pytest.mark.parametrize("kind", ["bytes", "prepend", "first"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_the_ids_of_transformers(folders, kind, name):
    """Whole conversations, and their prompts, by the published template and by the one that is exported."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[kind])
    tokenizer = data.Tokenizer.from_pretrained(folders[kind])
    exported = named(name).jinja(tokenizer)
    for talk in TALKS + [SPACED, SPACED_SYSTEM] * bool(TEMPLATES[name].trim or kind == "bytes" and name != "plain"):
        found = ours(folders[kind], name, talk)
        for text in {exported, PUBLISHED.get(name, exported)}:
            render = lambda said, text=text, **more: theirs.apply_chat_template(
                said, chat_template=text, tokenize=True, return_dict=False, **more)
            wanted = render(talk)
            if text != exported and name in ("chatml", "zephyr"):  # a line break that nothing follows
                assert theirs.decode(wanted).endswith("\n") and wanted[: len(found.ids)] == found.ids, (talk, name)
                assert len(wanted) - len(found.ids) <= 2
            else:
                assert found.ids == wanted, (talk, theirs.decode(wanted), theirs.decode(found.ids))
            question = ours(folders[kind], name, talk[:2] if talk[0]["role"] == "user" else talk[:3])
            before = [m for m in talk[:2] if m["role"] != "assistant"]
            assert question.ids[: question.prompt] == render(before, add_generation_prompt=True), (talk, name)


def test_alpacas_two_prompts_are_the_published_ones():
    opening = lambda user, given="": "".join(s.text for s in TEMPLATES["alpaca"].apply(
        example((user, "A"), given=given)).segments[:-1])
    assert opening("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n")
    assert opening("Say {x}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {x}.\n\n### Response:\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_somebody_said_is_told_apart_from_markup(name):
    """Whatever they said: braces, or the template's own markup."""
    asked, later = ("Q {} [/INST]", "{}"), ("R", "### Response:")
    applied = TEMPLATES[name].apply(example(asked, later, system="S {}", given="I"))
    assert [(s.role, s.text, s.trained) for s in applied.segments if s.role] == [
        ("system", "S {}", False), ("user", asked[0], False), ("input", "I", False), ("assistant", asked[1], True),
        ("user", later[0], False), ("assistant", later[1], True)]


def test_what_is_trained_on_is_each_answer_with_the_end_of_its_turn(folders):
    for name, end in {"plain": "</s>", "llama2": "</s>", "zephyr": "</s>", "llama3": "<|eot_id|>",
                      "chatml": "<|im_end|>"}.items():
        encoded, tokenizer = ours(folders["bytes"], name, ONE + TWO), data.Tokenizer.from_pretrained(folders["bytes"])
        trained = tokenizer.fast.decode([i for i in encoded.labels if i != -100], skip_special_tokens=False)
        assert trained.replace(" ", "") == f"4,Isay.{end}élan{end}", name
        bos = encoded.ids.count(tokenizer.bos_id)
        assert bos == {"plain": 1, "llama2": 2, "zephyr": 0, "llama3": 1, "chatml": 0}[name], "BOS alike in every turn"


@pytest.mark.parametrize("kind", ["bytes", "prepend", "first", pytest.param("real", marks=needs_real)])
def test_what_somebody_says_never_becomes_a_special_token(folders, kind):
    tokenizer = data.Tokenizer.from_pretrained(folders[kind])
    special = {i for i, token in tokenizer.fast.get_added_tokens_decoder().items() if token.content != "<unk>"}
    for name, template in TEMPLATES.items():
        if any(token not in tokenizer.special for token in template.tokens):
            continue
        choose(name, tokenizer, folders[kind])
        count = lambda text, template=template: sum(i in special for i in data.encode([template.apply(example(
            (text, text), system=text))], tokenizer, [""])[0].ids)
        for text in (*tokenizer.special, "".join(tokenizer.special), "a</s>b <s> c<|eot_id|>", "[INST] x [/INST]"):
            assert count(text) == count("x"), (name, text)


def test_a_token_that_is_not_marked_special_is_so_in_markup_only(tmp_path):
    """Some tokenizers have ChatML's tokens as ordinary added ones, which any text would produce."""
    folder = tokenizer_folder(tmp_path / "x")
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens(["<|im_start|>", "<|im_end|>"])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "config.json").unlink()
    ids = ours(folder, "chatml", [{"role": "user", "content": "<|im_end|>"}, ONE[1]]).ids
    assert [ids.count(fast.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")] == [2, 2]


@pytest.mark.parametrize("settings, name, source", [
    ({}, "plain", "the checkpoint names none"), ({"template": "alpaca"}, "alpaca", "named in tokenizer_config.json"),
    *(({"chat_template": text}, name, "recognised in the checkpoint's chat_template")
      for name, text in PUBLISHED.items()),
    ({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PUBLISHED["zephyr"]}]},
     "zephyr", "recognised in the checkpoint's chat_template"),
    ({"chat_template": "You are SmolLM" + PUBLISHED["chatml"]}, "chatml", "(a system text, tools) are left out"),
    ({"chat_template": "{{ '<start_of_turn>' }}"}, "plain", "none that is known here"),
    ({"chat_template": "{{ '[INST]' + content }}"}, "plain", "none that is known here")])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_the_checkpoint_says_its_template(folders, settings, name, source, tmp_path, where):
    text = settings.get("chat_template")
    if where == "chat_template.jinja" and isinstance(text, str):
        (tmp_path / where).write_text(text)
        settings = {}
    elif where == "chat_template.json":
        (tmp_path / where).write_text(json.dumps({"chat_template": text}))
        settings = {key: value for key, value in settings.items() if key == "template"}
    own = json.loads((folders["bytes"] / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**own, **settings}))
    shutil.copy(folders["bytes"] / "tokenizer.json", tmp_path)
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    found = choose("auto", tokenizer, tmp_path)
    assert found[0] == name and source in found[1], found
    assert choose("short", tokenizer, tmp_path) == ("short", "as asked for")
    assert not TEMPLATES[name].end or tokenizer.special[TEMPLATES[name].end] in tokenizer.stop_ids


def test_a_template_whose_tokens_are_absent_is_refused(tmp_path):
    tokenizer = data.Tokenizer.from_pretrained(BASE)
    for name, token in (("chatml", "<|im_start|>"), ("llama3", "<|start_header_id|>")):
        with pytest.raises(UserError, match=rf"template {name} needs the token '{token[:2]}.*another --template"):
            choose(name, tokenizer, BASE)
    folder = tokenizer_folder(tmp_path / "x", None, tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(UserError, match="template llama2 needs the token '<bos>'"):
        choose("llama2", data.Tokenizer.from_pretrained(folder), folder)
    (tmp_path / "a.json").write_text('[{"prompt": "a", "completion": "b"}]')
    assert "template short: named in tokenizer_config.json" in here("-m", "tools.show", tmp_path / "a.json").stdout
