"""A Llama from scratch, with Hugging Face's own parameter names.

One decoder layer, for hidden states h of shape (B, T, d):

    h = h + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))      n = RMSNorm(h)
    h = h + down_proj(silu(gate_proj(n)) * up_proj(n))                          n = RMSNorm(h)

Read in this order: the configuration, the blocks, the model with loading, saving and generation, files, and the
contract of every fine-tuning method (`Adapter`). This file imports nothing else of the project.

Shapes: B batch, T tokens, d hidden width, h heads, g key-value heads, hd head width, V vocabulary.
Errors: a UserError means that what the user asked for cannot be done; its message is the one line they see.
Source: Touvron et al., "LLaMA" (arXiv 2302.13971) and "Llama 2" (2307.09288); rotary positions, Su et al. (2104.09864).
"""

import json
import math
import os
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of stored weights
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a layer, in order of use


class UserError(ValueError):
    """A user's mistake, or what a file of theirs cannot give. The programs show it as one line, without a traceback;
    any other exception is a bug."""


# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class LlamaConfig:
    """The fields of a Hugging Face `config.json` that change what a Llama computes, under the same names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, path):
        """Reads a checkpoint folder's `config.json`. Raises UserError, naming the key, for what this model does not
        compute: another architecture, sliding-window attention, quantised weights, another activation or RoPE type."""
        file = Path(path) / "config.json"
        raw = read_json(file)

        def need(ok, key, expected):
            if not ok:
                raise UserError(f"{file}: {key} is {raw.get(key)!r:.80}, expected {expected}")

        kind = raw.get("model_type", "llama")
        if kind == "mistral":  # its defaults, as in transformers
            raw = {"max_position_embeddings": 131072, "sliding_window": 4096, **raw}
        need(kind in ("llama", "mistral"), "model_type", "'llama' (or 'mistral' without sliding window)")
        need(kind == "llama" or raw["sliding_window"] is None, "sliding_window",
             "null, written out: sliding-window attention is not implemented")
        need(not raw.get("quantization_config"), "quantization_config", "float32, float16 or bfloat16 weights")
        need(raw.get("hidden_act", "silu") == "silu", "hidden_act", "'silu'")
        with reading(file):
            known = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
            for f in fields(cls)[:5]:
                most = 2**12 if f.name == "num_hidden_layers" else 2**40
                need(type(known.get(f.name)) is int and 0 < known[f.name] < most, f.name, "a positive integer")
            # Newer files say everything about RoPE in one dictionary, older ones in `rope_theta` and `rope_scaling`.
            rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
            rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
            if rope["rope_type"] not in ("default", "linear", "llama3"):
                raise UserError(f"{file}: RoPE type is {rope['rope_type']!r}, expected default, linear or llama3")
            known["rope_theta"] = float(rope.pop("rope_theta", None) or raw.get("rope_theta") or 1e4)
            known["rope_scaling"] = None if rope["rope_type"] == "default" else rope
            config = cls(**known)
            for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "head_dim"):
                need(0 < getattr(config, key) < math.inf, key, "a positive number")
            need(config.num_attention_heads % config.num_key_value_heads == 0, "num_key_value_heads",
                 f"a divisor of num_attention_heads = {config.num_attention_heads}")
            need(config.head_dim % 2 == 0 and config.head_dim < 2**16, "head_dim",
                 "an even number below 65,536, because RoPE turns pairs of channels")
            if not rope_frequencies(config).isfinite().all():  # a KeyError where a number of the scaling is missing
                raise UserError(f"{file}: the RoPE settings {rope} give no finite frequencies")
        return config


# ---------------------------------------------------------------------------------------------- blocks


class Cache:
    """Keys and values of one batch of prompts, padded on the right to the longest, T. Generated token i of every row
    takes slot T + i, and the slots of padding are masked: no row ever sees another row's length.

    `memory` keeps what a method must remember from token to token, tensors (B, ...) (CS-ReFT: its gates).
    """

    def __init__(self, config, lengths, new, dtype):  # lengths (B,) of the prompts; new: tokens that follow, at most
        T = int(lengths.max())
        shape = (len(lengths), config.num_key_value_heads, T + new, config.head_dim)
        empty = lambda: torch.zeros(shape, device=lengths.device, dtype=dtype)
        self.layers = [(empty(), empty()) for _ in range(config.num_hidden_layers)]
        slots = torch.arange(T + new, device=lengths.device)
        hidden = (slots >= lengths[:, None]) & (slots < T)
        self.mask = torch.zeros(hidden.shape, device=lengths.device, dtype=dtype).masked_fill_(hidden, -math.inf)
        self.used, self.memory = 0, {}

    def put(self, layer, k, v):
        """Stores k, v (B, g, T, hd) in the next slots; gives all that is stored, as (B, g, slots, hd)."""
        end = self.used + k.shape[2]
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[:, :, self.used : end] = new
            yield kept[:, :, :end].to(new.dtype)

    def take(self, rows):
        """Keeps these rows of the batch, (N,) numbers or (B,) bool; some maybe several times: texts of one prompt."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        self.mask = self.mask[rows]
        self.memory = {name: tensor[rows] for name, tensor in self.memory.items()}


@dataclass
class Context:
    """What one forward pass knows besides the token ids. Every layer receives it, so a method's edit sees it too. The
    model works on a copy (with the same `memory`), so a Context may be used for another pass."""

    prompt_mask: torch.Tensor | None = None  # (B, T) bool: tokens of the prompt; None: every token
    tasks: torch.Tensor | None = None  # (B,) index of each example's task; None: unknown
    labelled: torch.Tensor | None = None  # (N,) positions b T + t whose next token has a label; None: see the labels
    cache: Cache | None = None  # None: the whole sequence is in this pass
    positions: torch.Tensor | None = None  # (B, T) or (1, T); None: 0 to T - 1
    rope: tuple | None = None  # cos and sin for rotate, made by the model
    mask: torch.Tensor | None = None  # (B, 1, T, slots), 0 where a query sees a slot, else -inf; None: causal
    memory: dict = field(default_factory=dict)  # a method's notes for this pass; while decoding, the cache's

    def __post_init__(self):
        if self.cache is not None:
            self.memory = self.cache.memory

    @property
    def decoding(self):
        """True where the pass continues a prompt that an earlier pass has read."""
        return self.cache is not None and self.prompt_mask is None


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):  # (..., d) -> weight * x / sqrt(mean(x^2) + eps)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_frequencies(config, device=None):
    """Angle per position of each channel pair, (hd / 2,): theta^(-2i / hd), then the configured scaling.

    `linear` divides every frequency by the factor; `llama3` leaves the short waves, divides the long ones and blends
    between (Llama 3.1's rule, as in its released code).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # turns within the original context
        blend = ((waves - low) / (high - low)).clamp(0, 1)
        return freq * (blend + (1 - blend) / scaling["factor"])
    return freq


def rotate(x, cos, sin):
    """Turns each pair (a, b) = (x_i, x_{i + hd/2}) by its position's angle, to (a cos - b sin, b cos + a sin).

    x (B, h, T, hd); cos, sin (B or 1, 1, T, hd), with -sin in the first half of the channels.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        d, hd, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.index, self.head_dim = index, hd
        self.q_proj = nn.Linear(d, config.num_attention_heads * hd, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * hd, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, d, bias=bias)

    def forward(self, x, ctx):  # (B, T, d)
        B, T, _ = x.shape
        cos, sin = ctx.rope
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, h, T, hd)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)  # (B, g, T, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, g, T, hd)
        if ctx.cache is not None:
            stored = list(ctx.cache.put(self.index, k, v))
            k, v = stored if ctx.decoding else (k, v)
        y = F.scaled_dot_product_attention(q, k, v, ctx.mask, is_causal=ctx.mask is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, m, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, m, bias=bias)
        self.up_proj = nn.Linear(d, m, bias=bias)
        self.down_proj = nn.Linear(m, d, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h, ctx):
        h = h + self.self_attn(self.input_layernorm(h), ctx)
        return h + self.mlp(self.post_attention_layernorm(h))


def run_layer(layer, h, ctx):
    return layer(h, ctx)


class Backbone(nn.Module):
    """Everything between token ids and logits; its own module only because Hugging Face's names begin with `model.`"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Zeros: nn.Embedding's own normal numbers make torch import its compiler on the meta device, for a second.
        zeros = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # True keeps only each layer's input, and runs the layer again for its gradients
        self.compiled = None  # run_layer as torch.compile makes it, for training; layers of one shape share their code

    def forward(self, ids, ctx):  # (B, T) -> (B, T, d)
        if ctx.prompt_mask is not None and ctx.prompt_mask.shape != ids.shape:
            raise ValueError(f"the Context is of {tuple(ctx.prompt_mask.shape)} tokens, the ids are {tuple(ids.shape)}")
        h, ctx = self.embed_tokens(ids), replace(ctx)
        if ctx.positions is None:
            ctx.positions = torch.arange(ids.shape[1], device=ids.device)[None]
        angles = ctx.positions[:, None, :, None] * rope_frequencies(self.config, ids.device)  # (B or 1, 1, T, hd / 2)
        angles = torch.cat((-angles, angles), dim=-1)  # see rotate; the cosine is the same
        ctx.rope = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        if ctx.decoding:  # a new token sees the prompt, the new ones before it, and itself
            new, used = ids.shape[1], ctx.cache.used
            ctx.mask = ctx.cache.mask[:, None, None, : used + new].to(h.dtype)
            if new > 1:
                ctx.mask = ctx.mask + torch.full_like(ctx.mask[0, 0].expand(new, -1), -math.inf).triu(used + 1)
        run = self.compiled if self.compiled and self.training else run_layer
        for layer in self.layers:
            h = checkpoint(run, layer, h, ctx, use_reentrant=False) if self.checkpointing else run(layer, h, ctx)
        if ctx.cache is not None:
            ctx.cache.used += ids.shape[1]
        return self.norm(h)


# ---------------------------------------------------------------------------------------------- the model


LOGITS = 2**24  # numbers in a piece of the logits whose loss is taken at once: 64 MiB in float32


def labelled_positions(labels):
    """(N,) positions b T + t of labels (B, T) whose next token has one."""
    row, place = (labels[:, 1:] != -100).nonzero().unbind(1)
    return row * labels.shape[1] + place


class SummedLoss(torch.autograd.Function):
    """- sum over n of log p_n[y_n], p_n = softmax(z_n), of the logits z = head(h) of rows h (N, d), for targets y (N,).

    A piece of rows at a time: its logits, their loss, and at once the gradient, which is p_n - onehot(y_n) at z_n. So
    no logits are kept for the backward pass, where all at once would decide the peak memory, and none are made twice.
    params: the head's trained tensors. Returns float64 where the device has it, so that parts add up to the whole.
    """

    @staticmethod
    def forward(ctx, head, rows, h, y, *params):
        total, wanted, found, grads = 0.0, any(ctx.needs_input_grad), [], [torch.zeros_like(p) for p in params]
        for part, target in zip(h.split(rows), y.split(rows)):
            with torch.set_grad_enabled(wanted):
                part = part.detach().requires_grad_(wanted)
                logits = head(part)
            z = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            largest, right = z.amax(-1, keepdim=True), z.gather(-1, target[:, None])
            p = (z - largest).exp_()
            sums = p.sum(-1, keepdim=True)
            losses = sums.log() + largest - right
            total = total + losses.sum(dtype=None if losses.device.type == "mps" else torch.float64)
            if wanted:
                p = p.div_(sums).scatter_add_(-1, target[:, None], -torch.ones_like(right))
                one, *others = torch.autograd.grad(logits, (part, *params), p.to(logits.dtype))
                found.append(one)
                grads = [grad.add_(other) for grad, other in zip(grads, others)]
        ctx.save_for_backward(*([torch.cat(found), *grads] if wanted else ()))
        return total

    @staticmethod
    def backward(ctx, scale):
        h, *grads = (scale * grad for grad in ctx.saved_tensors)
        return None, None, h, None, *grads


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dtype = torch.float32  # of the computation, whatever the trained tensors have
        self.tie_weights()

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def autocast(self):
        """Mixed precision where computation is asked for in bfloat16, so that float32 trained tensors can meet it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, ids, labels=None, ctx=None, reduction="mean"):
        """ids (B, T) -> logits (B, T, V); with labels (B, T) -> the loss over labelled tokens.

        labels follow Hugging Face: a copy of ids with -100 where no loss is wanted; the shift by one happens here.
        reduction "sum" (else "mean") leaves the division to a caller that accumulates gradients.
        """
        if labels is None:
            return self.lm_head(self.model(ids, ctx or Context()))
        h, targets = self.hidden_at_labels(ids, labels, ctx)
        rows = max(1, LOGITS // self.config.vocab_size)
        total = SummedLoss.apply(self.lm_head, rows, h, targets, *(
            p for p in self.lm_head.parameters() if p.requires_grad and torch.is_grad_enabled()))
        return total if reduction == "sum" else total / len(h)

    def hidden_at_labels(self, ids, labels, ctx=None):
        """Last hidden states (N, d) at the N positions whose next token has a label, and those labels (N,)."""
        ctx = ctx or Context()
        where = ctx.labelled if ctx.labelled is not None else labelled_positions(labels)
        return self.model(ids, ctx).flatten(0, 1)[where], labels.flatten()[where + 1]

    def labelled_logits(self, ids, labels, ctx=None):
        """Logits (N, V) at those positions, and the labels (N,), row by row."""
        h, targets = self.hidden_at_labels(ids, labels, ctx)
        return self.lm_head(h), targets

    # ------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """Loads a Hugging Face folder (`config.json`, and `model.safetensors` or shards with an index).

        Every tensor goes from the file straight to `device` and `dtype` (None: as it is stored); the peak extra memory
        is one tensor. One that needs no conversion stays mapped from the file; changing it leaves the file as it is.
        Raises UserError, naming file, tensor and what was expected, for anything missing, misshapen or left over.
        """
        path, state, config = Path(path), {}, LlamaConfig.from_pretrained(path)
        files, read = tensor_files(path), lambda name: read_tensor(files[name], name)  # {tensor name: file}
        embedding, head, ignored = "model.embed_tokens.weight", "lm_head.weight", ("rotary_emb.inv_freq",)
        if {embedding, head} <= files.keys() and not read(head).equal(read(embedding)):
            config.tie_word_embeddings = False  # a head that differs counts, as in transformers
        with reading(path / "config.json"), torch.device("meta"):
            model = cls(config)
        targets = model.state_dict()  # {tensor name: meta tensor}
        if config.tie_word_embeddings:  # a file may hold either of the two
            targets.pop(embedding if embedding not in files and head in files else head)
            ignored += (embedding, head)
        if stray := [name for name in files if name not in targets and not name.endswith(ignored)]:
            raise UserError(f"{path}: {stray[0]!r} has no place in the model that config.json describes")
        plain = rope_frequencies(replace(config, rope_scaling=None))
        differs = lambda tensor: tensor.shape != plain.shape or not plain.allclose(tensor.float(), rtol=1e-2)
        if other := [name for name in files if name.endswith(ignored[0]) and differs(read(name))]:
            print(f"note: {other[0]} in {path} is of another rope_theta than config.json, which counts")
        # The largest first: it is mapped while it is converted, and the peak is lowest while little else is loaded.
        for name, target in sorted(targets.items(), key=lambda item: -item[1].numel()):
            if name not in files:
                raise UserError(f"{path}: tensor {name!r} is missing, expected shape {tuple(target.shape)}")
            tensor = read(name)
            if tensor.shape != target.shape or tensor.dtype not in DTYPES:
                raise UserError(f"{files[name]}: tensor {name!r} is {str(tensor.dtype)[6:]} of shape "
                                f"{tuple(tensor.shape)}, expected float32, float16 or bfloat16 of shape "
                                f"{tuple(target.shape)}: quantised weights cannot be read")
            state[name] = tensor.to(device, dtype)
        if config.tie_word_embeddings:  # whichever the file held is the embedding
            state.setdefault(embedding, state.pop(head, None))
        model.load_state_dict(state, strict=False, assign=True)
        model.dtype = dtype
        return model.tie_weights().eval()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def save_pretrained(self, path):
        """Writes `config.json` and `model.safetensors` as transformers reads them; tied weights once.

        Raises UserError while a method's own tensors are in the model: merge it first.
        """
        with torch.device("meta"):
            names = Llama(self.config).state_dict().keys()
        tensors = self.state_dict()
        if extra := [name for name in tensors if name not in names]:
            raise UserError(f"cannot save a plain checkpoint while {extra[0]!r} is attached: merge() first")
        if self.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        write_json(Path(path) / "config.json", {  # in the spelling that every version of transformers reads
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **asdict(self.config),
            "torch_dtype": str(self.model.embed_tokens.weight.dtype)[6:]})
        with written(Path(path) / "model.safetensors") as part:  # these weights may be mapped from the file there now
            save_file({name: t.contiguous() for name, t in tensors.items()}, part, {"format": "pt"})

    # ------------------------------------------------------------------------------------------ generation

    def read(self, prompts, new, tasks=None):
        """Prompts (B lists of ids) in one pass: (hidden states (B, d) at their ends, their lengths (B,), a Cache with
        room for so many new tokens)."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        B, T = len(prompts), int(lengths.max())
        if int(lengths.min()) == 0:
            raise UserError("cannot continue an empty prompt: it has no token, not even BOS")
        ids = torch.tensor([list(p) + [0] * (T - len(p)) for p in prompts], device=self.device)
        mask = torch.arange(T, device=self.device) < lengths[:, None]
        tasks = None if tasks is None else torch.tensor(tasks, device=self.device)
        dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else self.lm_head.weight.dtype  # of the computation
        cache = Cache(self.config, lengths, new, dtype)
        h = self.model(ids, Context(mask, tasks, cache=cache))
        return h[torch.arange(B, device=self.device), lengths - 1], lengths, cache

    @torch.no_grad()
    def continuation_logits(self, prompts, texts, of, tasks=None):
        """Logits (N, V) of the N tokens of texts, row by row. Text i, a list of ids, continues prompts[of[i]]; a prompt
        is read once. tasks: index of each prompt's task."""
        longest, of = max(1, *map(len, texts)), torch.tensor(of, device=self.device)
        h, lengths, cache = self.read(prompts, longest, tasks)
        cache.take(of)
        steps, sizes = torch.arange(longest, device=self.device), torch.tensor(list(map(len, texts)))
        states = [h[of][:, None]]  # the end of the prompt predicts the first token, each token the one after it
        if longest > 1:
            ids = torch.tensor([(text + [0] * longest)[: longest - 1] for text in texts], device=self.device)
            states.append(self.model(ids, Context(cache=cache, positions=lengths[of][:, None] + steps[:-1])))
        return self.lm_head(torch.cat(states, dim=1)[steps < sizes.to(self.device)[:, None]])

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=64, stop=(), temperature=0.0, generator=None, tasks=None,
                 finished=torch.all):
        """Continues a batch of prompts (lists of token ids) of any lengths, with a key-value cache.

        stop: the token ids that end a row (not returned). temperature 0 is greedy. tasks: index of each prompt's task.
        finished: from (B,) bool, whether a row has ended, to whether generation ends.
        Returns one list of new token ids for each prompt, which, unless it is sampled, does not depend on the other
        prompts. Raises UserError for an empty prompt, for more tokens than the model has positions, and where its
        numbers overflow.
        """
        if max(map(len, prompts)) + max_new_tokens > self.config.max_position_embeddings:
            raise UserError(f"{max(map(len, prompts))} prompt tokens and {max_new_tokens} new ones exceed the model's "
                            f"max_position_embeddings of {self.config.max_position_embeddings}")
        h, lengths, cache = self.read(prompts, max_new_tokens, tasks)
        ends = torch.tensor(sorted(stop), dtype=torch.long, device=self.device)
        found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=self.device)
        rows, ended = torch.arange(len(prompts), device=self.device), torch.zeros_like(lengths, dtype=torch.bool)
        for step in range(max_new_tokens):
            logits = self.lm_head(h).float()  # (B, V)
            if not step and not logits.isfinite().all():
                raise UserError("the model's numbers overflow: try --dtype float32, or a lower --lr")
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            found[rows, step] = token
            ended[rows] |= torch.isin(token, ends)
            if step == max_new_tokens - 1 or step % 8 == 7 and bool(finished(ended)):  # asking makes the host wait
                break
            # Rows that have ended leave. Where all have, they stay: in a sharded run other processes may need the pass.
            if step % 8 == 7 and not (going := ~ended[rows] | ended.all()).all():
                rows, token = rows[going], token[going]
                cache.take(going)
            h = self.model(token[:, None], Context(cache=cache, positions=(lengths[rows] + step)[:, None]))[:, 0]
        return [row[: next((i for i, token in enumerate(row) if token in stop), None)] for row in found.tolist()]


# ---------------------------------------------------------------------------------------------- files


@contextmanager
def reading(file):
    """Within, whatever goes wrong while a user's file is interpreted becomes a UserError: one line that names the file.
    What is a sentence already stays as it is."""
    try:
        yield
    except (UserError, OSError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        found = f"{error.args[0]!r} is missing" if type(error) is KeyError else str(error) or type(error).__name__
        raise UserError(f"{file} cannot be read: {found}") from error


def read_json(path):
    """The object (dict) in a JSON file. Raises UserError where the file is absent or holds something else."""
    if not Path(path).is_file():  # nor a pipe or a device, which may never end
        raise UserError(f"{path} {'is no regular file' if Path(path).exists() else 'does not exist'}")
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object: {{...}}")
    return value


@contextmanager
def written(path):
    """Gives a name beside `path` to write to, which then takes its place: an interrupted write leaves the old file. The
    process number keeps two writers apart."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.touch()
    mode = part.stat().st_mode  # the user's ordinary permissions, which safetensors narrows
    try:
        yield part
        part.chmod(mode)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with written(path) as part:
        part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def open_tensors(file):
    """The opened safetensors file. Raises UserError where it is cut short or none."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete safetensors file, fetch it again: {error}") from error


def read_tensor(file, name):  # opens the file anew: the pages of a mapped one count as memory
    with open_tensors(file) as tensors:
        return tensors.get_tensor(name)


def checkpoint_files(path):
    """[Path] of all that decides what a checkpoint computes and says: its weights, and these where they exist."""
    beside = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
    return [*sorted(set(tensor_files(path).values())), *(path / name for name in beside if (path / name).exists())]


def tensor_files(path):
    """{tensor name: file} of a checkpoint folder, from its one file or from the index of its shards."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        with open_tensors(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if not index.exists():
        found = next((f", only {file.name}: load and save it with transformers, which writes safetensors"
                      for file in sorted(path.glob("*.bin"))), "")
        raise UserError(f"{path} has no model.safetensors{found}")
    with reading(index):
        files = {name: path / Path(file).name for name, file in read_json(index)["weight_map"].items()}
    if absent := [file for file in files.values() if not file.is_file()]:
        raise UserError(f"{index} names {absent[0].name}, which is not in the folder: fetch the missing shard")
    return files


# ---------------------------------------------------------------------------------------------- the method contract


class Adapter:
    """What `attach(model, config)` of a method file returns. Every hook has a default, so a method overrides only what
    it needs. The default trains, saves and loads whatever has `requires_grad`.

    A training step of `train.py` calls, in this order: loss and penalty (per micro-batch), backward, gradient clipping,
    before_step, optimizer.step, after_step.
    """

    prepare_steps = 0  # of how many training steps prepare() wants the data

    def __init__(self, model):
        self.model = model

    def param_groups(self, lr, weight_decay):
        """The optimiser's parameter groups. Norms and biases, of one dimension, have no weight decay."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": [p for p in params if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
                {"params": [p for p in params if p.dim() <= 1], "lr": lr, "weight_decay": 0.0}]

    def optimizer(self, lr, weight_decay):
        """The optimiser of param_groups. The training loop varies the rate of each group from its value here."""
        return torch.optim.AdamW(self.param_groups(lr, weight_decay), fused=self.model.device.type in ("cpu", "cuda"))

    def loss(self, batch):
        """The loss of a micro-batch (ids, labels and ctx), summed over its labelled tokens. For another objective, such
        as a KL to the base or DPO."""
        return self.model(batch.ids, batch.labels, batch.ctx, reduction="sum")

    def prepare(self, steps):
        """Called once before the first step, on the unchanged model, with the data of the first `prepare_steps` steps:
        an iterable of lists of micro-batches. A continued run calls it too, and then loads its tensors."""

    def penalty(self, ctx):
        """A scalar added to the mean loss of a micro-batch; ctx is the Context of its forward pass."""
        return 0.0

    def before_step(self):
        """Between gradient clipping and the optimiser's step."""

    def after_step(self):
        """After the optimiser's step."""

    def tensors(self):
        """{name: tensor} to save: enough to restore the adapted model on the same base."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_tensors(self, tensors):
        """Restores what tensors() gave. Raises UserError where names or shapes differ."""
        own = self.tensors()
        for name in sorted(own.keys() | tensors.keys()):
            found, expected = (f"of shape {tuple(of[name].shape)}" if name in of else "absent" for of in (tensors, own))
            if found != expected:
                raise UserError(f"adapter tensor {name!r} is {found}, expected {expected}: the file was made with "
                                "other settings")
            own[name].copy_(tensors[name])

    def merge(self):
        """Folds the update into the base weights and takes the method out of the model. Raises UserError where that
        is impossible."""

    def scored(self, scores, score, suite):
        """More for `results.json`, after training. scores: {task: {figure: value}}; score() makes them anew, of the
        model as it is then. suite: whose means they have."""
        return {}

    def report(self):
        """A few figures for `results.json`, after training."""
        return {}


def find_linears(model, targets):
    """The decoder layers' linear modules whose last name is in `targets`: {full name: nn.Linear}.

    Raises UserError, listing the valid names, for a target that matches nothing.
    """
    if wrong := [t for t in targets if t not in LINEARS]:
        raise UserError(f"target {wrong[0]!r} matches no linear layer; valid: {', '.join(LINEARS)}")
    if not targets:
        raise UserError(f"no target given; valid: {', '.join(LINEARS)}")
    return {name: m for name, m in model.named_modules()
            if name.startswith("model.layers.") and name.rsplit(".", 1)[1] in targets}


def parse_layers(text, count):
    """Layer numbers from "all", "3,9,18" or "25%-50%", for a model of `count` layers (0-based).

    Layer i lies in lo-hi % when lo <= (i + 1/2) / count < hi. Raises UserError for a text of another form, and where it
    names no layer or one outside the model.
    """
    layers = list(range(count)) if text == "all" else []
    with suppress(ValueError):
        if "%" in text:
            lo, hi = (float(part.strip().rstrip("%")) / 100 for part in text.split("-"))
            layers = [i for i in range(count) if lo <= (i + 0.5) / count < hi]
        elif text != "all":
            layers = sorted({int(part) for part in text.split(",")})
    if not layers or layers[0] < 0 or layers[-1] >= count:
        raise UserError(f"layers {text!r}: expected all, a list such as 3,9,18 or a range such as 25%-50%, of layers 0 "
                        f"to {count - 1}")
    return layers
