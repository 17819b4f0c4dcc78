"""A few prompts of each kind, answered before and after training: what the figures of the table look like."""

from itertools import zip_longest
from os.path import commonprefix

LONGEST = 48  # tokens of an answer


def pick(suite, count, positions):
    """[(task, Encoded)], the first `count` test examples of each kind of task, from its tasks in turn; of those that
    have a prompt, and room for an answer in a model of so many positions."""
    kinds = {}
    for task, examples in suite.tests.items():
        fit = [(task, e) for e in examples[: 10 * count] if 0 < e.prompt <= positions - LONGEST]
        kinds.setdefault((suite.group[task], suite.aspect[task]), []).append(fit[:count])
    return [sample for lists in kinds.values()
            for sample in [one for turn in zip_longest(*lists) for one in turn if one][:count]]


def answer(model, picked, tokenizer):
    """The text that the model says to each prompt."""
    if not picked:
        return []
    with model.autocast():
        rows = model.eval().generate([e.ids[: e.prompt] for _, e in picked], LONGEST, tokenizer.stop_ids,
                                     tasks=[e.task for _, e in picked])
    return [tokenizer.decode(row).strip() for row in rows]


def tell(picked, before, after, tokenizer):
    """Prints the samples, a line each, without the markup that all prompts share; returns what samples.json holds."""
    prompts = [tokenizer.decode(e.ids[: e.prompt]) for _, e in picked]
    head = len(commonprefix(prompts))
    tail = len(commonprefix([prompt[head:][::-1] for prompt in prompts]))
    short = lambda text, width: repr(text)[1:-1] if len(text) <= width else repr(text[: width - 3])[1:-1] + "..."
    print("\nprompt -> answer before | after | wanted" * bool(picked))
    for (task, e), prompt, old, new in zip(picked, prompts, before, after):
        asked = prompt[head : len(prompt) - tail] if len(picked) > 1 else prompt
        print(f"  {task}: {short(asked, 60)} -> {short(old, 25)} | {short(new, 25)} | {short(e.gold.strip(), 25)}")
    return [{"task": task, "prompt": prompt, "before": old, "after": new, "wanted": e.gold}
            for (task, e), prompt, old, new in zip(picked, prompts, before, after)]
