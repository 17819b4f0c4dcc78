"""A real language model, SmolLM2-135M-Instruct as tools.gguf makes it; the variable SMOLLM2 names its folder."""

import os
from pathlib import Path

import pytest
import torch

import train
from formats import choose
from data import Example, Segment, Tokenizer
from model import Llama
from tests.helpers import here, json_lines, their_logits

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
