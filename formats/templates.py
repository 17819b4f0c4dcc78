"""Prompt templates: how a conversation becomes text. {} is what somebody says; all around it is markup.

BOS and EOS are the tokenizer's business (data.encode).
"""

from dataclasses import dataclass, replace

from data import Segment
from model import UserError


def fill(form, *pieces, trained=False):
    """The segments of a form: its own text as markup, and in the place of each {} one of the pieces, which are lists
    of segments."""
    first, *rest = form.split("{}")
    segments = [Segment(first, trained=trained)]
    for piece, after in zip(pieces, rest):
        segments += [*piece, Segment(after, trained=trained)]
    return [s for s in segments if s.text or s.role]


@dataclass
class Template:
    first: str  # the opening turn of the user
    later: str  # the turns after it
    answer: str = "{}"
    paired: str | None = None  # an opening turn of instruction and input; None: they are one text, a blank line between
    system: str | None = None  # an opening turn of system text and instruction; None: the same

    def opening(self, system, user, given):
        """The segments of the first user turn. Each argument is a list of segments; system and given may be empty."""
        if given and self.paired and not system:
            return fill(self.paired, user, given)
        user = fill("{}\n\n{}", user, given) if given else user
        if system and self.system:
            return fill(self.system, system, user)
        return fill(self.first, fill("{}\n\n{}", system, user) if system else user)

    def apply(self, example):
        """An Example of bare segments (system, user, input, assistant) with this template's markup around them. One
        without a prompt is plain text: no template."""
        said = {role: [s for s in example.segments if s.role == role] for role in ("system", "user", "input")}
        if not said["user"]:
            return example
        segments, opened = [], False
        for segment in example.segments:
            if segment.role == "assistant":
                segments += fill(self.answer, [segment], trained=True)
            elif segment.role == "user" and opened:
                segments += fill(self.later, [segment])
            elif segment.role == "user":
                segments += self.opening(said["system"], [segment], said["input"])
                opened = True
        choices = example.choices and [self.answer.replace("{}", choice) for choice in example.choices]
        return replace(example, segments=segments, choices=choices)


ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
SHORT = "### Instruction:\n{}\n\n### Response:\n"
LLAMA3 = ("<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n")
# `short`, the built-in suite's, is Alpaca's without its opening sentence.
TEMPLATES = {
    "plain": Template("{}", "\n{}", " {}"),
    "short": Template(SHORT, "\n\n" + SHORT),
    "alpaca": Template(ALPACA.format("") + "\n\n" + SHORT, "\n\n" + SHORT, paired=ALPACA.format(
        ", paired with an input that provides further context") + "\n\n" + SHORT.replace(
        "\n\n### R", "\n\n### Input:\n{}\n\n### R")),
    "llama2": Template("[INST] {} [/INST]", "<s>[INST] {} [/INST]", " {} ",
                       system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n{} [/INST]"),
    "llama3": Template(LLAMA3, LLAMA3, system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>" + LLAMA3),
}


def named(name):
    """The Template of this name. Raises UserError, listing the names, where there is none."""
    if not isinstance(name, str) or name not in TEMPLATES:
        raise UserError(f"there is no template {name!r:.80}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
