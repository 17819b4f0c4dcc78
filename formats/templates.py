"""Prompt templates: how a conversation becomes text. {} is what somebody says, the rest is markup.

Only markup holds special tokens: what somebody said is text, whatever it spells (data.pieces). Chat models' templates
spell their own BOS and the end of each turn; around those of base models data.encode puts the tokenizer's.
"""

import json
import re
from dataclasses import dataclass, replace

from tokenizers import AddedToken

from data import BOS, EOS, Segment
from model import UserError, read_json


def fill(form, *pieces, trained=False):
    """The segments of a form: its own text as markup, and in the place of each {} one of the pieces, which are lists
    of segments."""
    first, *rest = form.split("{}")
    segments = [Segment(first, trained=trained)]
    for piece, after in zip(pieces, rest):
        segments += [*piece, Segment(after, trained=trained)]
    return [s for s in segments if s.text or s.role]


def strip(segment, left=True, right=True):
    """The segment without the spaces at these ends."""
    text = segment.text.lstrip() if left else segment.text
    return replace(segment, text=text.rstrip() if right else text)


@dataclass
class Template:
    first: str  # the opening turn of the user
    later: str  # the turns after it
    reply: str = ""  # what opens an answer; not trained
    answer: str = "{}"
    paired: str | None = None  # an opening turn of instruction and input; None: they are one text, a blank line between
    system: str | None = None  # an opening turn of system text and instruction; None: the same
    end: str | None = None  # the token behind an answer, of a template that spells its BOS; None: EOS, and no BOS
    tokens: tuple = ()  # the special tokens that the tokenizer must have
    trim: str | None = None  # where spaces are taken off: around each text that is "said", or around a whole "turn"
    marks: tuple = ()  # what all a checkpoint's chat_template holds that is this one

    def turn(self, said, opening):
        """The segments of a user's turn, from those of what is said in it."""
        if self.trim:  # a turn that opens with system text begins with markup
            each, marked = self.trim == "said", opening and any(s.role == "system" for s in said)
            said = [strip(s, each or s is said[0] and not marked, each or s is said[-1]) for s in said]
        system, user, given = ([s for s in said if s.role == role] for role in ("system", "user", "input"))
        if opening and given and self.paired and not system:
            return fill(self.paired + self.reply, user, given)
        user = fill("{}\n\n{}", user, given) if given else user
        if opening and system and self.system:
            return fill(self.system + self.reply, system, user)
        user = fill("{}\n\n{}", system, user) if system else user
        return fill((self.first if opening else self.later) + self.reply, user)

    def apply(self, example):
        """An Example of bare segments (system, user, input, assistant) with this template's markup around them. One
        without a prompt is plain text: no template."""
        if not any(s.role == "user" for s in example.segments):
            return example
        segments, said, opening = [], [], True
        for segment in example.segments:
            if segment.role == "assistant":
                answer = [strip(segment) if self.trim else segment]
                segments += self.turn(said, opening) + fill(self.answer, answer, trained=True)
                said, opening = [], False
            else:
                said.append(segment)
        if said:  # a question that waits for its answer
            segments += self.turn(said, opening)
        choices = example.choices and [self.answer.replace("{}", choice) for choice in example.choices]
        return replace(example, segments=segments, choices=choices, end=self.end)

    def jinja(self, tokenizer):
        """The same as a chat_template of transformers, which spells what this tokenizer puts before a text."""
        def text(form, **pieces):
            """A form as an expression: its own text quoted, a name in the place of each {}."""
            parts, names = re.split(rf"({{}}|{BOS}|{EOS})", form), iter(pieces.values())
            known = {BOS: "bos_token", EOS: "eos_token"}
            return " + ".join(next(names) if p == "{}" else known.get(p) or json.dumps(p) for p in parts if p) or '""'

        content, trim = "message['content']", " | trim" * bool(self.trim)
        whole = self.trim == "turn"  # then system text has markup around it, and keeps its spaces
        bos = self.end is None and tokenizer.encode("")[:1] == [tokenizer.bos_id]
        start = ("bos_token" if bos else '""') + ' + " "' * bool(bos and tokenizer.lead and not tokenizer.respaced)
        if self.system:
            system = text(self.system, system="system", user=content + ".rstrip()" if whole else "said")
        else:
            system = text(self.first, user='(system + "\\n\\n" + said)')
        return (
            "{% if messages[0]['role'] == 'system' %}"
            f"{{% set system = messages[0]['content']{trim * (not whole)} %}}{{% set turns = messages[1:] %}}"
            "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ " + start + " }}"
            "{% for message in turns %}{% set said = " + content + trim + " %}{% if message['role'] == 'assistant' %}"
            "{{ " + f"{text(self.reply)} + {text(self.answer, said='said')} + {text(self.end or EOS)}" + " }}"
            "{% elif loop.first and system %}{{ " + system + " }}"
            "{% elif loop.first %}{{ " + text(self.first, user="said") + " }}"
            "{% else %}{{ " + text(self.later, user="said") + " }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + text(self.reply) + " }}{% endif %}")


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
ASKED = "### Instruction:\n{}\n\n"
START, HEAD = "<|im_start|>", "<|start_header_id|>{}<|end_header_id|>\n\n"  # of ChatML, of Llama 3
LLAMA3 = {role: HEAD.replace("{}", role) for role in ("system", "user", "assistant")}
# `short`, the built-in suite's, is Alpaca's without its opening sentence.
TEMPLATES = {
    "plain": Template("{}", "\n{}", answer=" {}"),
    "short": Template(ASKED, "\n\n" + ASKED, "### Response:\n"),
    "alpaca": Template(ALPACA.format("") + "\n\n" + ASKED, "\n\n" + ASKED, "### Response:\n", paired=ALPACA.format(
        ", paired with an input that provides further context") + "\n\n" + ASKED + "### Input:\n{}\n\n"),
    "chatml": Template(f"{START}user\n{{}}<|im_end|>\n", f"\n{START}user\n{{}}<|im_end|>\n", f"{START}assistant\n",
                       system=f"{START}system\n{{}}<|im_end|>\n{START}user\n{{}}<|im_end|>\n", end="<|im_end|>",
                       tokens=(START, "<|im_end|>"), marks=(START, "<|im_end|>")),
    "zephyr": Template(f"<|user|>\n{{}}{EOS}\n", f"\n<|user|>\n{{}}{EOS}\n", "<|assistant|>\n",
                       system=f"<|system|>\n{{}}{EOS}\n<|user|>\n{{}}{EOS}\n", end=EOS, tokens=(EOS,),
                       marks=("<|user|>", "<|assistant|>", "eos_token")),
    "llama2": Template(f"{BOS}[INST] {{}} [/INST]", f"{BOS}[INST] {{}} [/INST]", answer=" {} ",
                       system=f"{BOS}[INST] <<SYS>>\n{{}}\n<</SYS>>\n\n{{}} [/INST]", end=EOS, tokens=(BOS, EOS),
                       trim="turn", marks=("[INST]", "<<SYS>>", "eos_token")),
    "llama3": Template(f"{BOS}{LLAMA3['user']}{{}}<|eot_id|>", f"{LLAMA3['user']}{{}}<|eot_id|>", LLAMA3["assistant"],
                       system=f"{BOS}{LLAMA3['system']}{{}}<|eot_id|>{LLAMA3['user']}{{}}<|eot_id|>", end="<|eot_id|>",
                       tokens=(BOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), trim="said",
                       marks=("<|start_header_id|>", "<|eot_id|>")),
}


def named(name):
    """The Template of this name. Raises UserError, listing the names, where there is none."""
    if not isinstance(name, str) or name not in TEMPLATES:
        raise UserError(f"there is no template {name!r:.80}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def choose(asked, tokenizer, folder):
    """(the name of a Template, where it is from) for a checkpoint: what is asked for, if not "auto"; else what its
    tokenizer_config.json or its chat_template says, which is recognised by its markup; else plain.

    The tokenizer stops at the template's end of turn from now on. Raises UserError where it lacks a token.
    """
    name, source = asked, "as asked for"
    if asked == "auto" and tokenizer.template:
        name, source = tokenizer.template, "named in tokenizer_config.json"
    elif asked == "auto":
        text = chat_template(folder)
        known = (name for name, t in TEMPLATES.items() if t.marks and all(mark in text for mark in t.marks))
        name = next(known, "plain")
        source = "recognised in the checkpoint's chat_template" if name != "plain" else (
            "the checkpoint's chat_template is none that is known here" if text else "the checkpoint names none")
        if name != "plain" and re.search("You are|Cutting Knowledge|tools|enable_thinking", text):
            source += "; its additions (a system text, tools) are left out"
    template = named(name)
    if absent := [token for token in template.tokens if token not in tokenizer.special]:
        raise UserError(f"the template {name} needs the token {absent[0]!r}, which the tokenizer of {folder} does not "
                        f"have: choose another --template ({', '.join(TEMPLATES)})")
    own = [token for token in template.tokens if token not in (BOS, EOS)]
    tokenizer.fast.add_special_tokens([AddedToken(token, normalized=False) for token in own])  # in case they are not
    if template.end:
        tokenizer.stop_ids.add(tokenizer.special[template.end])
    return name, source


def chat_template(folder):
    """The text of a checkpoint's chat_template, from any of the files where transformers looks for it; else ""."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).exists() else None
        if isinstance(found, list):  # several by name
            found = next((part.get("template") for part in found
                          if isinstance(part, dict) and part.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return ""
