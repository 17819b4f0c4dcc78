"""A Llama from scratch, with Hugging Face's own parameter names.

One decoder layer, for hidden states h of shape (B, T, d):

    h = h + o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n)))      n = RMSNorm(h)
    h = h + down_proj(silu(gate_proj(n)) * up_proj(n))                          n = RMSNorm(h)

Read in this order: the configuration and what is refused, the blocks, the model with loading, saving and generation,
files, and the contract that every fine-tuning method fulfils (`Adapter`). This file imports nothing of the project:
with one method file beside it, it works in any other one.

Shapes: B batch, T tokens, d hidden width, h heads, g key-value heads, hd head width, V vocabulary.
Errors: a UserError means that what the user asked for cannot be done; its message is the one line they see.
Source: Touvron et al., "LLaMA" (arXiv 2302.13971) and "Llama 2" (2307.09288); rotary positions, Su et al. (2104.09864).
"""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

SHORT = 64  # tokens up to which attention written out is faster on a CPU
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
        """Reads the `config.json` of a checkpoint folder. Raises UserError as from_dict does."""
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder; expected a checkpoint in Hugging Face layout")
        return cls.from_dict(read_json(Path(path) / "config.json"), Path(path) / "config.json")

    @classmethod
    def from_dict(cls, raw, where="config.json"):
        """Reads a parsed `config.json`.

        Raises UserError, naming the key, for what this model does not compute: another architecture, sliding-window
        attention, quantised weights, another activation, an unknown RoPE type, or a missing size.
        """

        def refuse(key, expected):
            raise UserError(f"{where}: {key} is {raw.get(key)!r}, expected {expected}")

        kind = raw.get("model_type", "llama")
        if kind not in ("llama", "mistral"):
            refuse("model_type", "'llama' (or 'mistral' without sliding window)")
        if kind == "mistral" and raw.setdefault("sliding_window", 4096) is not None:  # transformers' default
            refuse("sliding_window", "null, written out: sliding-window attention is not implemented")
        if raw.get("quantization_config"):
            raise UserError(f"{where}: quantization_config is set, expected float32, float16 or bfloat16 weights")
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "'silu'")
        sizes = [f.name for f in fields(cls)[:5]]
        if absent := [name for name in sizes if raw.get(name) is None]:
            refuse(absent[0], "a positive integer")
        known = typed(cls, {k: value for k, value in raw.items() if value is not None and k != "rope_scaling"}, where)
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if not 0 < known.get(name, 1) < 2**40:
                refuse(name, "a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < known.get(name, 1) < math.inf:
                refuse(name, "a positive number")

        # Newer files say everything about RoPE in one dictionary, older ones in `rope_theta` and `rope_scaling`.
        for rope in (raw.get("rope_parameters"), raw.get("rope_scaling")):
            if rope is not None and not isinstance(rope, dict):
                raise UserError(f"{where}: RoPE scaling is {rope!r:.80}, expected null or an object with rope_type and "
                                "factor")
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
        rope_type = rope.setdefault("rope_type", rope.pop("type", "default"))
        required = {"default": (), "linear": ("factor",), "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if not isinstance(rope_type, str) or rope_type not in required:
            raise UserError(f"{where}: RoPE type is {rope_type!r}, expected one of {', '.join(required)}")
        for key in required[rope_type]:
            if not fits(rope.get(key), float) or not 0 < rope[key] < math.inf:
                raise UserError(f"{where}: RoPE type {rope_type!r} needs a number {key!r}, found {rope.get(key)!r}")
        if not fits(theta, float) or not 0 < theta < math.inf:
            raise UserError(f"{where}: rope_theta is {theta!r}, expected a positive number")

        known.update(rope_theta=float(theta), rope_scaling=None if rope_type == "default" else rope)
        config = cls(**known)
        if config.num_attention_heads % config.num_key_value_heads:
            refuse("num_key_value_heads", f"a divisor of num_attention_heads = {config.num_attention_heads}")
        widest = max(config.vocab_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
        if widest * config.hidden_size >= 2**48:
            refuse("hidden_size", f"a size that fits a machine: a weight has {widest:,} rows of that many numbers")
        if config.head_dim % 2:
            refuse("head_dim", "an even number, because RoPE turns pairs of channels")
        return config

    def to_dict(self):
        """What `config.json` holds, in the spelling that every version of transformers reads."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                **{f.name: getattr(self, f.name) for f in fields(self)}}


# ---------------------------------------------------------------------------------------------- blocks


class Cache:
    """Keys and values of one generation, in slots. Prompts are padded on the right to the longest, T; the tokens that
    follow take one slot after the other behind it, in every row alike, whatever their positions. The mask hides the
    slots of padding: no row ever sees another row's length.

    `memory` keeps what a method must remember from token to token (CS-ReFT: its gates).
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


@dataclass
class Context:
    """What one forward pass knows besides the token ids. Every layer receives it, so a method's edit sees it too."""

    prompt_mask: torch.Tensor | None = None  # (B, T) bool: tokens of the prompt; None: every token
    tasks: torch.Tensor | None = None  # (B,) index of each example's task; None: unknown
    labelled: torch.Tensor | None = None  # (N,) positions b T + t whose next token has a label, the only ones whose
    # last hidden state is right; None: all are
    cache: Cache | None = None  # None: the whole sequence is in this pass
    positions: torch.Tensor | None = None  # (B, T) or (1, T), filled by the model when None
    rope: tuple | None = None  # cos and sin for rotate, filled by the model
    mask: torch.Tensor | None = None  # (1 or B, 1, T, slots), 0 where a query sees a slot, else -inf; None: causal
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
        return self.o_proj(attend(q, k, v, ctx.mask).transpose(1, 2).reshape(B, T, -1))


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(hd) + mask) v for q (B, h, T, hd), k and v (B, g, S, hd); no mask: causal, and T = S.

    Written out where that is faster than torch's fused kernel: for short sequences on a CPU, where Decoder gives a
    mask, in float32 at least.
    """
    B, h, T, hd = q.shape
    if mask is None or T == 1 or q.device.type != "cpu" or q.dtype == torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                              enable_gqa=h != k.shape[1])
    if h != k.shape[1]:
        k, v = (x.repeat_interleave(h // x.shape[1], dim=1) for x in (k, v))
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B h, S, hd)
    scores = torch.baddbmm(mask.expand(B, h, T, -1).flatten(0, 1), q.flatten(0, 1), k.mT, alpha=hd**-0.5)
    return (scores.softmax(-1) @ v).view(B, h, T, hd)


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
        self.last = index == config.num_hidden_layers - 1

    def forward(self, h, ctx):
        h = h + self.self_attn(self.input_layernorm(h), ctx)
        if self.last and ctx.labelled is not None:  # nothing reads the other positions behind this layer
            every, rows = h.flatten(0, 1), ctx.labelled
            update = self.mlp(self.post_attention_layernorm(every[rows]))
            return every.index_add(0, rows, update.to(h.dtype)).view_as(h)
        return h + self.mlp(self.post_attention_layernorm(h))


def run_layer(layer, h, ctx):
    return layer(h, ctx)


class Decoder(nn.Module):
    """Everything between token ids and logits; its own module only because Hugging Face's names begin with `model.`"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Zeros: nn.Embedding's own normal numbers make torch import its compiler on the meta device, for a second.
        zeros = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequencies = None  # of rope, made when first needed
        self.checkpointing = False  # True keeps only each layer's input, and runs the layer again for its gradients
        self.compiled = None  # run_layer as torch.compile makes it, for training; layers of one shape share their code

    def forward(self, ids, ctx):  # (B, T) -> (B, T, d)
        h = self.embed_tokens(ids)
        if ctx.positions is None:
            ctx.positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if self.frequencies is None or self.frequencies.device != ids.device:
            self.frequencies = rope_frequencies(self.config, ids.device)
        angles = ctx.positions[:, None, :, None] * self.frequencies  # (B or 1, 1, T, hd / 2)
        angles = torch.cat((-angles, angles), dim=-1)  # see rotate; the cosine is the same
        ctx.rope = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        if ctx.decoding:
            ctx.mask = ctx.cache.mask[:, None, None, : ctx.cache.used + 1].to(h.dtype)
        elif h.device.type == "cpu" and ids.shape[1] <= SHORT:
            places = torch.arange(ids.shape[1], device=ids.device)
            hidden = places > ctx.positions[:, None, :, None]  # a query sees the tokens up to its own position
            ctx.mask = torch.zeros(hidden.shape, dtype=h.dtype, device=h.device).masked_fill_(hidden, -math.inf)
        run = self.compiled if self.compiled and self.training else run_layer
        for layer in self.layers:
            h = checkpoint(run, layer, h, ctx, use_reentrant=False) if self.checkpointing else run(layer, h, ctx)
        if ctx.cache is not None:
            ctx.cache.used += ids.shape[1]
        return self.norm(h)


# ---------------------------------------------------------------------------------------------- the model


LONG = 64  # new tokens from which on a compiled step is worth its making
LOGITS = 2**25  # numbers in a piece of the logits whose loss is taken at once: 128 MiB in float32


def labelled_positions(labels):
    """(N,) positions b T + t of labels (B, T) whose next token has one."""
    row, place = (labels[:, 1:] != -100).nonzero().unbind(1)
    return row * labels.shape[1] + place


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dtype = torch.float32  # of the computation, whatever the trained tensors have
        self.compiled = None  # self.model as torch.compile makes it, for the tokens of long answers
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
        h, targets = self.labelled(ids, labels, ctx)
        rows = max(1, LOGITS // self.config.vocab_size)
        if len(h) <= rows:
            total = self.summed_loss(h, targets)
        else:  # in pieces, whose logits are made again for the backward pass: all at once would decide the peak memory
            total = sum(checkpoint(self.summed_loss, *part, use_reentrant=False)
                        for part in zip(h.split(rows), targets.split(rows)))
        return total if reduction == "sum" else total / len(h)

    def summed_loss(self, h, targets):
        """- sum of log p(target), in float64 where there is one, so that parts add up to the loss of the whole."""
        logits = self.lm_head(h)
        losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")
        return losses.sum(dtype=None if losses.device.type == "mps" else torch.float64)

    def labelled(self, ids, labels, ctx=None):
        """Last hidden states (N, d) at the N positions whose next token has a label, and those labels (N,)."""
        ctx = ctx or Context()
        where = ctx.labelled if ctx.labelled is not None else labelled_positions(labels)
        return self.model(ids, ctx).flatten(0, 1)[where], labels.flatten()[where + 1]

    def labelled_logits(self, ids, labels, ctx=None):
        """Logits (N, V) at those positions, and the labels (N,), row by row."""
        h, targets = self.labelled(ids, labels, ctx)
        return self.lm_head(h), targets

    def init_weights(self, seed):
        """Fresh weights for pretraining: normal(0, 0.02), the two projections that write to the residual stream smaller
        by 1/sqrt(2 L) (GPT-2's rule), norms at one, biases at zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.constant_(p, float(name.endswith("norm.weight")))
            else:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if out else 0.02
                nn.init.normal_(p, std=std, generator=generator)

    # ------------------------------------------------------------------------------------------ loading and saving

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """Loads a Hugging Face folder (`config.json`, and `model.safetensors` or shards with an index).

        Every tensor goes from the file straight to `device` and `dtype` (None: as it is stored); the peak extra memory
        is one tensor. One that is already right stays mapped: its pages are read when first used, and changing them
        leaves the file unchanged.
        Raises UserError, naming file, tensor and what was expected, for anything missing, misshapen or left over.
        """
        path, state, config = Path(path), {}, LlamaConfig.from_pretrained(path)
        files = tensor_files(path)  # {tensor name: file}
        held = {name.split(".")[2] for name in files if name.startswith("model.layers.")}
        if len(held) != config.num_hidden_layers:  # before as many layers are made
            raise UserError(f"{path}: config.json says num_hidden_layers {config.num_hidden_layers}, but the weight "
                            f"files hold {len(held)} layers")
        with torch.device("meta"):
            model = cls(config)

        targets = model.state_dict()
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if config.tie_word_embeddings:  # a file may hold either of the two
            targets.pop(embedding if embedding not in files and head in files else head)
        # The largest first: it is mapped while it is converted, and the peak is lowest while little else is loaded.
        for name, target in sorted(targets.items(), key=lambda item: -item[1].numel()):
            if name not in files:
                raise UserError(f"{path}: tensor {name!r} is missing, expected shape {tuple(target.shape)}")
            # Reopened for each tensor: pages of a mapped file count as memory for as long as the mapping lives.
            with open_tensors(files[name]) as tensors:
                stored = tensors.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if kind not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(f"{files[name]}: tensor {name!r} holds {kind}, expected F32, F16 or BF16: "
                                     "quantised weights cannot be read")
                if shape != tuple(target.shape):
                    raise UserError(f"{files[name]}: tensor {name!r} has shape {shape}, "
                                     f"expected {tuple(target.shape)}")
                state[name] = tensors.get_tensor(name).to(device, dtype)
            if not finite(state[name]):
                raise UserError(f"{files[name]}: tensor {name!r} holds NaN or infinity: the file is damaged")
        ignored = ("rotary_emb.inv_freq", *((embedding, head) if config.tie_word_embeddings else ()))
        stray = [name for name in files if name not in targets and not name.endswith(ignored)]
        if stray:
            raise UserError(f"{path}: {len(stray)} tensors have no place in this model, the first is {stray[0]!r}; "
                             "config.json does not describe this file")
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
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        dtype = str(self.model.embed_tokens.weight.dtype).removeprefix("torch.")
        write_json(path / "config.json", {**self.config.to_dict(), "torch_dtype": dtype})
        with written(path / "model.safetensors") as part:  # these very weights may be mapped from the file there now
            save_file({name: t.contiguous() for name, t in tensors.items()}, part, {"format": "pt"})

    # ------------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=64, stop=(), temperature=0.0, generator=None, tasks=None,
                 finished=torch.all):
        """Continues a batch of prompts of any lengths with a key-value cache.

        prompts: lists of token ids. stop: the token ids that end a row (not returned). temperature 0 is greedy.
        tasks: the index of each prompt's task, where it is known. finished: whether to end, from a bool for each row
        that says whether it has met a stop.
        Returns one list of new token ids for each prompt, the same as for that prompt alone. Raises UserError for an
        empty prompt, for more tokens than the model has positions, and where its numbers overflow.
        """
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        B, T = len(prompts), int(lengths.max())
        if int(lengths.min()) == 0:
            raise UserError("cannot continue an empty prompt: it has no token, not even BOS")
        if T + max_new_tokens > self.config.max_position_embeddings:
            raise UserError(f"{T} prompt tokens and {max_new_tokens} new ones exceed the model's "
                             f"max_position_embeddings of {self.config.max_position_embeddings}")
        ids = torch.zeros(B, T, dtype=torch.long, device=self.device)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        cache = Cache(self.config, lengths, max_new_tokens, self.model.embed_tokens.weight.dtype)
        mask = torch.arange(T, device=self.device) < lengths[:, None]
        tasks = None if tasks is None else torch.tensor(tasks, device=self.device)
        last = torch.arange(B, device=self.device), lengths - 1

        def sound(h):
            if not finite(h):
                raise UserError("the model's numbers overflow while it generates: try --dtype float32, or a lower --lr")
            return h

        h = sound(self.model(ids, Context(mask, tasks, cache=cache))[last])  # (B, d)
        ends, found = torch.tensor(sorted(stop), dtype=torch.long, device=self.device), []  # found: (B,) of each step
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        decode = self.compiled if self.compiled and max_new_tokens >= LONG else self.model
        for step in range(max_new_tokens):
            logits = (self.lm_head.weight @ h.T).T  # up to three times as fast on a CPU as h @ W^T
            if temperature > 0:
                chances = (logits.float() / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            found.append(token)
            ended |= torch.isin(token, ends)
            if step == max_new_tokens - 1 or step % 8 == 7 and bool(finished(ended)):  # asking makes the host wait
                break
            h = decode(token[:, None], Context(cache=cache, positions=(lengths + step)[:, None]))[:, 0]
        sound(h)  # NaN in one step is in all that follow
        rows = torch.stack(found, dim=1).tolist()
        return [row[: next((i for i, token in enumerate(row) if token in stop), None)] for row in rows]


# ---------------------------------------------------------------------------------------------- files


def read_json(path):
    """The object (dict) in a JSON file. Raises UserError in one line where the file is absent or holds no such."""
    if not Path(path).is_file():  # nor a pipe or a device, which may never end
        raise UserError(f"{path} {'is no regular file' if Path(path).exists() else 'does not exist'}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object: {{...}}")
    return value


def finite(tensor):
    """Whether no number is NaN or infinite. Such show in the sum, which needs no copy; as a sum may overflow too, every
    number is looked at then."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def fits(value, kind):
    """Whether a JSON value is of the type that an annotation names; true and false are no numbers."""
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(part, get_args(kind)[0]) for part in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def typed(cls, raw, where):
    """{field: value} of what parsed JSON has of a dataclass's fields. Raises UserError, naming file, key and what was
    expected, for a value of another type than the field's annotation names, or for none of its choices."""
    known = {}
    for name, kind in get_type_hints(cls).items():
        if name in raw:
            if not fits(raw[name], kind):
                raise UserError(f"{where}: {name} is {raw[name]!r:.80}, expected {getattr(kind, '__name__', kind)}")
            known[name] = raw[name]
    return known


@contextmanager
def written(path):
    """Gives a name beside `path` to write to. What is there takes the place of `path` once it is on the disk, so that
    an interrupted write leaves the old file whole. The process number keeps two writers apart."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.touch()
    mode = part.stat().st_mode  # the user's ordinary permissions, which safetensors narrows
    try:
        yield part
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {str(error).removeprefix('Error while serializing: ')}") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with written(path) as part:
        part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def open_tensors(file):
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete safetensors file, fetch it again: {error}") from None


def tensor_files(path):
    """{tensor name: file} of a checkpoint folder, from its one file or from the index of its shards."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.exists() and not single.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{index}: weight_map is missing or malformed, expected {{tensor name: file name}}")
        if outside := [file for file in places.values() if not file or Path(file).name != file]:
            raise UserError(f"{index} names {outside[0]!r:.80}, expected files of its own folder")
        places = {name: path / file for name, file in places.items()}
        for file in sorted(set(places.values())):
            if not file.exists():
                raise UserError(f"{index} names {file.name}, which is not in the folder: fetch the missing shard")
            with open_tensors(file) as tensors:
                held = set(tensors.keys())
            if absent := [name for name, place in places.items() if place == file and name not in held]:
                raise UserError(f"{file}: tensor {absent[0]!r} is missing, {index.name} says it is there")
        return places
    if single.exists():
        with open_tensors(single) as tensors:
            return {name: single for name in tensors.keys()}
    found = next((f", only {p.name}: load and save it with transformers, which writes safetensors"
                  for p in sorted(path.glob("*.bin"))), "")
    raise UserError(f"{path} has no model.safetensors{found}")


# ---------------------------------------------------------------------------------------------- the method contract


class Adapter:
    """What `attach(model, config)` of a method file returns. Every hook has a default, so a method overrides only what
    it needs. The default trains, saves and loads whatever has `requires_grad`.

    A training step of `train.py` calls, in this order: penalty (per micro-batch), backward, gradient clipping,
    before_step, optimizer.step, after_step.
    """

    prepare_steps = 0  # of how many training steps prepare() wants the data

    def __init__(self, model):
        self.model = model

    def param_groups(self, lr, weight_decay):
        """The optimiser's parameter groups."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": params, "lr": lr, "weight_decay": weight_decay}]

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
        if own.keys() != tensors.keys():
            name = min(own.keys() ^ tensors.keys())
            raise UserError(f"adapter tensor {name!r} is {'missing' if name in own else 'unexpected'}: "
                             "the file was made with other settings")
        for name, target in own.items():
            if not finite(tensors[name]):
                raise UserError(f"adapter tensor {name!r} holds NaN or infinity: the file is damaged")
            if target.shape != tensors[name].shape:
                raise UserError(f"adapter tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                                 f"expected {tuple(target.shape)}: the file was made with other settings")
            target.copy_(tensors[name])

    def merge(self):
        """Folds the update into the base weights and takes the method out of the model. Raises UserError where that
        is impossible."""

    def report(self):
        """A few figures for `results.json`, after training."""
        return {}


def count_parameters(config):
    """Parameters of the plain model, tied ones once; makes no weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


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

    Layer i lies in lo-hi % when lo <= (i + 1/2) / count < hi. Raises UserError for a range that is malformed, empty or
    outside the model.
    """
    if text == "all":
        return list(range(count))
    try:
        if "%" in text:
            lo, hi = (float(part.strip().rstrip("%")) / 100 for part in text.split("-"))
            layers = [i for i in range(count) if lo <= (i + 0.5) / count < hi]
        else:
            layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"layers {text!r}: expected all, a list such as 3,9,18 or a range such as 25%-50%") from None
    if not layers:
        raise UserError(f"layers {text!r}: this range holds none of the model's {count} layers")
    if layers[0] < 0 or layers[-1] >= count:
        raise UserError(f"layers {text!r}: the model has layers 0 to {count - 1}")
    return layers
