"""From README alone: a chat model's folder and a ShareGPT file to a checkpoint that transformers chats with."""

import json
import re

import pytest
import tokenizers

from data import Tokenizer
from formats import FORMATS, TEMPLATES
from model import Llama, LlamaConfig
from tests.helpers import BASE, HERE, here, one_line_error, perturb, written

README = (HERE / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Use your own checkpoint and data\n")[2].partition("\n## ")[0]


def chat_model(folder):
    """A random checkpoint as SmolLM's are: ChatML's tokens are BOS and EOS, the template is in the tokenizer's file."""
    fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model = Llama(LlamaConfig(fast.get_vocab_size(), 32, 48, 2, 4, max_position_embeddings=256))
    model.init_weights(0)
    perturb(model, 0.2)
    model.save_pretrained(folder)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "</s>",
        "chat_template": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
                         "+ '<|im_end|>' + '\n'}}{% endfor %}"}))
    return folder


def test_four_commands_from_a_chat_model_and_its_talk_to_a_checkpoint(tmp_path):
    chat_model(tmp_path / "CHAT-MODEL")
    talk = [{"conversations": [{"from": "human", "value": f"Name three fruits. {i}"}, {"from": "gpt", "value": "pear"}]}
            for i in range(40)]
    written(tmp_path / "talk.json", talk, "array")
    commands = re.findall(r"^python (.*)$", SECTION.partition("```\n")[2].partition("```")[0], re.M)
    assert len(commands) == 4
    said = []
    for command in commands:
        words = re.findall(r'"[^"]*"|\S+', command.replace("300", "8").replace("train.py", str(HERE / "train.py")))
        more = ["--batch-size", "8", "--lr", "1e-2"] if "train.py" in command else []
        said.append(here(*(word.strip('"') for word in words), *more, cwd=tmp_path).stdout)
    assert all("template chatml: recognised in the checkpoint's chat_template" in text for text in said[:2])
    assert "40 records of format sharegpt" in said[0] and "[<|im_end|>]" in said[0]
    merged = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_pretrained(tmp_path / "merged")
    end = tokenizer.special["<|im_end|>"]
    assert merged["eos_token_id"] == [2, end] and tokenizer.template == "chatml"

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    prompt = theirs.apply_chat_template([{"role": "user", "content": "Name three fruits."}], tokenize=True,
                                        add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert new[-1] == end or len(new) == 64, "transformers goes on behind the end of the turn"
    assert theirs.decode(new, skip_special_tokens=True) == said[2].rpartition("\n[")[0] and len(new) < 64


def test_readme_names_the_formats_and_templates_that_there_are():
    named = re.findall(r"`(\w+)`", SECTION.partition("Known are ")[2].partition(";")[0])
    assert named == list(FORMATS)
    table = here("-m", "tools.show", "--formats").stdout
    for name, kind in FORMATS.items():
        assert f"| `{name}` | {kind.fields} |" in table
    named = re.findall(r"`(\w+)`", SECTION.partition("Templates are ")[2].partition(", to the")[0])
    assert set(named) == set(TEMPLATES)


def test_a_file_of_no_format_is_told_what_there_is(tmp_path):
    written(tmp_path / "odd.json", [{"colour": "red"}])
    message = one_line_error("-m", "tools.show", "odd.json", "--base", BASE, cwd=tmp_path)
    assert len(message) <= 300 and all(name in message for name in FORMATS), message
