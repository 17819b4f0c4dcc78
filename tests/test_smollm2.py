"""A real language model, SmolLM2-135M-Instruct as tools.gguf makes it; the variable SMOLLM2 names its folder."""

import json
import os
from pathlib import Path

import pytest
import torch

import train
from formats import choose
from data import Example, Segment, Tokenizer
from model import Llama
from tests.helpers import cli, here, json_lines, kill, their_logits

FOLDER = Path(os.environ.get("SMOLLM2", "out/smollm2"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.is_dir(), reason="SMOLLM2 names no folder of the model")]
QUESTION = "What is the capital of France?"
RUN = ("--base", FOLDER, "--tasks", "currency", "--steps", "3", "--batch-size", "4", "--eval-limit", "1", "--samples",
       "0", "--device", "cpu")


def test_logits_ids_and_greedy_text_equal_transformers():
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer.from_pretrained(FOLDER), transformers.AutoTokenizer.from_pretrained(FOLDER)
    template, _ = choose("auto", ours, FOLDER)
    said = [Segment("Be short.", "system"), Segment(QUESTION, "user")]
    prompt = ours.encode_segments(template.apply(Example("", said)).segments)[0]
    assert prompt == theirs.apply_chat_template([{"role": s.role, "content": s.text} for s in said],
                                                add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(Llama.from_pretrained(FOLDER)(ids), their_logits(FOLDER, ids), atol=1e-4, rtol=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert Llama.from_pretrained(FOLDER).generate([prompt], 8) == [text.tolist()]
    assert "Paris" in here("-m", "tools.chat", FOLDER, QUESTION, "--max-new-tokens", "12").stdout


@pytest.mark.parametrize("name", train.find_methods())
def test_three_steps_of_each_method_lower_the_loss(tmp_path, name):
    more = ("--layers", "50%-100%", "--importance-batches", "2") if name == "cofitune" else ()
    here("train.py", "--method", name, *RUN, *more, "--out", tmp_path / "run")
    first, last = (line["loss"] for line in json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert last < first


def test_a_killed_run_continues_to_the_same_bytes_and_its_exports_are_read(tmp_path):
    command = ("train.py", "--method", "multilora", *RUN, "--save-every", "1", "--out")
    killed = kill((*command, tmp_path / "killed"), (tmp_path / "killed" / "checkpoint.safetensors").exists)
    cli(*command, tmp_path / "killed")
    cli(*command, tmp_path / "whole")
    one, other = (tmp_path / name / "adapter.safetensors" for name in ("killed", "whole"))
    assert killed and one.read_bytes() == other.read_bytes()
    model, *_ = train.load_run(tmp_path / "whole")
    ids = torch.randint(49152, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids)
    here("-m", "tools.export", tmp_path / "whole", "--hf", tmp_path / "merged")
    torch.testing.assert_close(their_logits(tmp_path / "merged", ids), wanted, atol=2e-4, rtol=0)
    here("-m", "tools.export", tmp_path / "whole", "--peft", tmp_path / "peft")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 12
