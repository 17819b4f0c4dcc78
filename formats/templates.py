"""Prompt templates: a template is a Jinja chat template, the checkpoint's own where it has one.

A conversation is rendered twice, as it is and with a private mark in the place of each text. So markup and what
somebody said can be told apart, and special tokens come from markup alone. Rendering follows transformers: the same
sandbox, settings, filters and globals.
"""

import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import Segment
from model import UserError, read_json, reading

TASK = "Below is an instruction that describes a task"
# An answer ends with EOS; a system text leads the first question.
ASKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content + eos_token }}{% else %}"
    "{% if loop.first or loop.previtem.role == 'assistant' %}{{ '' if loop.first else '\n\n' }}"
    "{{ '### Instruction:\n' }}{% endif %}{{ message.content + '\n\n' }}"
    "{{ '### Response:\n' if message.role == 'user' else '' }}{% endif %}{% endfor %}")
TEMPLATES = {
    "plain":
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
        "{% else %}{{ '\n' if not loop.first and loop.previtem.role == 'assistant' else '' }}{{ message.content }}"
        "{{ '\n\n' if message.role == 'system' else '' }}{% endif %}{% endfor %}",
    "short": ASKED,  # the built-in suite's
    "alpaca":
        "{{ '" + TASK + "' }}{{ ', paired with an input that provides further context' if messages[0].input else '' }}"
        "{{ '. Write a response that appropriately completes the request.\n\n' }}"
        + ASKED.replace("message.content + '\n\n'", "message.instruction + '\n\n### Input:\n' + message.input + '\n\n' "
                        "if message.input else message.content + '\n\n'"),
    "chatml":
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
    "zephyr":
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}"
        "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '' }}",
    "llama2":
        "{% if messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% endif %}"
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{% set said = system + message.content if system and loop.index0 == 1 else message.content %}"
        "{{ bos_token + '[INST] ' + said | trim + ' [/INST]' }}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
    "llama3":
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}",
}
BARE = ("plain", "short", "alpaca")  # without BOS: the tokenizer's goes in front


def raise_exception(message):
    raise TemplateError(message)


SANDBOX = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
SANDBOX.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
SANDBOX.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})


def messages_of(said):
    """The messages of bare segments. An input (Alpaca's) goes to the question before it."""
    messages = []
    for s in said:
        if s.role == "input":
            messages[-1] |= {"instruction": messages[-1]["content"], "input": s.text}
            messages[-1]["content"] += "\n\n" + s.text
        else:
            messages.append({"role": s.role, "content": s.text})
    return messages


class Template:
    """A Jinja chat template, for a tokenizer whose special tokens it spells. name: of one in TEMPLATES, else its text.
    Raises UserError for a text that is no Jinja template."""

    def __init__(self, name, tokenizer):
        self.name, self.tokenizer = name, tokenizer
        self.opening = tokenizer.opening if name in BARE else ""
        with reading("the chat template"):
            self.compiled = SANDBOX.from_string(TEMPLATES.get(name, name))

    def render(self, messages, ask=False):
        """The text of messages; with ask, and of the markup that an answer follows. Raises UserError for messages that
        the template refuses."""
        try:
            return self.opening + self.compiled.render(messages=messages, add_generation_prompt=ask,
                                                       **self.tokenizer.names)
        except Exception as error:  # whatever the template's code may raise
            raise UserError(f"the chat template refuses the conversation: {error}") from error

    def exported(self):
        """The same as a chat_template of transformers, which spells what this tokenizer puts before a text."""
        bos = self.tokenizer.names.get("bos_token", "")
        return ("{{ bos_token }}" + self.opening[len(bos) :]) * bool(self.opening) + TEMPLATES.get(self.name, self.name)

    def answers(self, example):
        """[Example] of a row, one for each answer that is trained on: its prompt is all before that answer."""
        said = example.segments
        return [self.apply(replace(example, segments=said[: i + 1], choices=example.choices if s is said[-1] else None))
                for i, s in enumerate(said) if s.trained]

    def apply(self, example):
        """The Example of bare segments (system, user, input, assistant) with markup around them. Trained are its last
        answer, and the markup behind that up to the first special token, or EOS where there is none. An Example without
        a question is plain text: no template."""
        said = example.segments
        if not any(s.role == "user" for s in said):
            return replace(example, segments=[Segment(self.tokenizer.opening), *said,
                                              Segment(self.tokenizer.names["eos_token"], trained=True)])
        choices = example.choices and {
            choice: self.segments([*said[:-1], replace(said[-1], text=choice)]) for choice in example.choices}
        return replace(example, segments=self.segments(said), choices=choices)

    def segments(self, said):
        """The segments of bare ones, with markup."""
        messages, waits = messages_of(said), said[-1].role != "assistant"
        text = self.render(messages, ask=waits)
        pieces = self.tell_apart(said, text, waits)
        if waits:
            return pieces or [Segment(text)]
        prompt, last = self.render(messages[:-1], ask=True), self.tokenizer.added
        if pieces:  # what the markup in front of the answer has more than a prompt belongs to the answer
            place = max(i for i, s in enumerate(pieces) if s.role == "assistant")
            before, answer = pieces[:place], pieces[place]
            cut = len(prompt) - len("".join(s.text for s in before[:-1]))
            if text.startswith(prompt) and 0 <= cut <= len(before[-1].text):
                markup = before.pop().text
                before += [Segment(markup[:cut]), Segment(markup[cut:], trained=True)]
            tail = "".join(s.text for s in pieces[place + 1 :])
        elif text.startswith(prompt) and text != prompt:  # the template rewrites what was said
            end = last.search(text, len(prompt))
            before, tail = [Segment(prompt)], text[end.start() :] if end else ""
            answer = Segment(text[len(prompt) : len(text) - len(tail)], "assistant")
        else:
            raise UserError("the chat template rewrites the conversation, and the place of the answer cannot be told")
        end = last.search(tail)
        tail = tail[: end.end()] if end else self.tokenizer.names["eos_token"]
        return [s for s in (*before, replace(answer, trained=True), Segment(tail, trained=True)) if s.text or s.role]

    def tell_apart(self, said, text, waits):
        """The segments of a rendered text: markup, and what was said, maybe stripped. None where marks in the place of
        what was said show that the template does more than that."""
        marked = [replace(s, text=f"\ue000{i}\ue001") for i, s in enumerate(said)]
        shown = self.render(messages_of(marked), ask=waits)
        first, *parts = re.split("\ue000(\\d+)\ue001", shown)  # markup, number of a text, markup, ...
        pieces, at = [Segment(first)], len(first)
        for number, markup in zip(parts[::2], parts[1::2]):
            piece = replace(said[int(number)], trained=False)
            forms = (piece.text, piece.text.strip(), piece.text.rstrip(), piece.text.lstrip())
            piece.text = next((form for form in forms if text.startswith(form + markup, at)), None)
            if piece.text is None:
                return None
            pieces, at = [*pieces, piece, Segment(markup)], at + len(piece.text + markup)
        answered = waits or str(len(said) - 1) in parts[::2]
        return pieces if answered and text.startswith(first) and at == len(text) else None


def dress(suite, template, mix="proportional"):
    """The Suite with a template around its examples; for training each answer of a talk becomes an example. mix "equal"
    repeats the smaller tasks' examples until each task has as many as the largest."""
    train = [one for example in suite.train for one in template.answers(example)]
    if suite.train and not train:
        raise UserError("no answer is to be trained on: all rows have weight 0, train false or another such mark")
    if mix == "equal":
        tasks = {name: [one for one in train if one.task == name] for name in suite.trained}
        most = max(map(len, tasks.values()))
        train = [every[i % len(every)] for every in tasks.values() if every for i in range(most)]
    return replace(suite, train=train, validation=[template.apply(example) for example in suite.validation],
                   tests={task: [template.apply(example) for example in suite.tests[task]] for task in suite.tests})


def solved(example):
    """The text of a row with its answer, as the template plain has it."""
    return SANDBOX.from_string(TEMPLATES["plain"]).render(messages=messages_of(example.segments), eos_token="")


def choose(asked, tokenizer, folder):
    """(Template, where it is from) for a checkpoint: the one asked for, by name, file or text; with "auto" that of the
    checkpoint, else plain. The tokenizer stops at the token that ends its answers from now on. Raises UserError for a
    name that is none, and for a token that the tokenizer lacks."""
    source = "as asked for"
    if asked == "auto":
        own = chat_template(folder)
        asked, source = (own, "the checkpoint's") if own else ("plain", "the checkpoint has none")
    elif asked not in TEMPLATES and "{" not in asked:
        if not Path(asked).is_file():
            raise UserError(f"--template {asked:.80}: expected auto, a file, or one of {', '.join(TEMPLATES)}")
        with reading(asked):
            asked = Path(asked).read_text(encoding="utf-8")
    if absent := [token for token in re.findall(r"<\|\w+\|>", TEMPLATES.get(asked, ""))
                  if tokenizer.fast.token_to_id(token) is None]:
        raise UserError(f"the template {asked} needs the token {absent[0]!r}, which the tokenizer of {folder} does not "
                        "have: choose another --template")
    spelled = TEMPLATES.get(asked, asked)
    tokenizer.protect([token.content for token in tokenizer.fast.get_added_tokens_decoder().values()
                       if token.content in spelled and not token.special])
    template = Template(asked, tokenizer)
    end = template.segments([Segment("a", "user"), Segment("b", "assistant")])[-1].text
    tokenizer.stop_ids.add(tokenizer.fast.token_to_id(tokenizer.added.search(end)[0]))
    return template, source


def chat_template(folder):
    """The text of a checkpoint's chat_template, from any of the files where transformers looks for it; else ""."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).exists() else None
        if isinstance(found, list):  # several by name
            with reading(folder / name):
                found = {part["name"]: part["template"] for part in found}.get("default")
        if isinstance(found, str):
            return found
    return ""
