"""The tests, tested: wrong versions of the code, one change each. Which test notices one, and what does it say?

    python -m tests.mutate                            # all of them: about half an hour
    python -m tests.mutate csreft.py                  # those of one file
    python -m tests.mutate csreft.py --about gates    # those whose description has this word

Each is made in a temporary copy of the project, where the tests of its file run until one fails. Ends with exit code 1
where a wrong version was not noticed. A change of the code may take an entry's old text away: an error says which.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.flags import Parser, command_line
from model import UserError
from tests.helpers import HERE, clone

METHOD = lambda name: ("test_methods.py", "-k", name)
TESTS = {"multilora.py": METHOD("multilora or lora"), "csreft.py": METHOD("csreft or loreft"),
         "cofitune.py": METHOD("cofitune or sft"),
         "model.py": ("tests/test_model.py", "tests/test_speed.py",
                      "tests/test_train.py::test_norms_and_biases_have_no_weight_decay"),
         "data.py": ("tests/test_data.py", "tests/test_scores.py", "tests/test_speed.py"),
         "train.py": ("tests/test_model.py::test_a_training_step_is_the_one_written_out",
                      "tests/test_model.py::test_the_loss_and_the_optimiser_are_those_of_the_method",
                      "test_methods.py::test_every_method_trains_float32_tensors_beside_a_bfloat16_base",
                      "tests/test_train.py", "tests/test_resume.py")}

# {file: ((old text, new text, what is wrong), ...)}; an old text, as short as that allows, occurs once in
# its file.
WRONG = {
    "multilora.py": (
        ("self.A, -linear.in_features**-0.5, linear.in_features**-0.5)", "self.A, -(r**-0.5), r**-0.5)",
         "A from B's range"),
        ("nn.init.uniform_(self.A, -linear.in_features**-0.5, linear.in_features**-0.5)",
         "nn.init.normal_(self.A, 0.0, (3 * linear.in_features) ** -0.5)", "A normal instead of uniform"),
        ("-linear.in_features**-0.5, linear", "0.0, linear", "A from positive numbers alone"),
        ("            nn.init.uniform_(self.B, -(r**-0.5), r**-0.5)\n", "", "B at zero, as in LoRA"),
        ('if config.scaling != "none":\n', "if True:\n", "LoRA with B and s of MultiLoRA"),
        ("nn.Parameter(torch.zeros(n, linear.out_features if", "nn.Parameter(torch.ones(n, linear.out_features if",
         "s starts at one"),
        ('linear.out_features if config.scaling == "vector" else 1', "1", "s a number whatever is asked"),
        ("torch.promote_types(linear.weight.dtype, torch.float32)}", "linear.weight.dtype}",
         "trained tensors in the base's dtype"),
        ("promote_types(linear.weight.dtype, torch.float32)", "float32", "float32 tensors beside a float64 base"),
        ("config.alpha / r, config.dropout", "config.alpha, config.dropout", "alpha instead of alpha / r"),
        ("config.alpha / r, config.dropout", "config.alpha / r**0.5, config.dropout", "alpha / sqrt(r)"),
        ("config.alpha / r, config.dropout", "config.alpha / (n * r), config.dropout", "alpha / (n r)"),
        ("self.s[:, :, None] * self.B", "self.s[:1, :, None] * self.B", "s_1 for every module"),
        ("self.s[:, :, None] * self.B", "self.s.detach()[:, :, None] * self.B", "s detached"),
        ("self.s[:, :, None] * self.B", "self.s[:, :, None] * self.B.detach()", "B detached"),
        ("return self.A.flatten(0, 1), self.factor", "return self.A.detach().flatten(0, 1), self.factor", "A detached"),
        ("up.transpose(0, 1).flatten(1)", "up.permute(1, 2, 0).flatten(1)", "A_i meets the B of another module"),
        ("self.factor * up.transpose", "up.transpose", "factors without alpha / r"),
        ("F.linear(F.linear(F.dropout(x, self.dropout, self.training), down), up)",
         "F.dropout(F.linear(F.linear(x, down), up), self.dropout, self.training)", "dropout on the update"),
        ("F.dropout(x, self.dropout, self.training)", "F.dropout(x, self.dropout)", "dropout at evaluation too"),
        ("F.dropout(x, self.dropout, self.training)", "x", "no dropout"),
        ("MultiLoRA(linear, config).train(linear.training)", "MultiLoRA(linear, config)",
         "update in training mode beside a model in evaluation"),
        ('"lr": lr, "weight_decay": 0.0', '"lr": lr, "weight_decay": weight_decay', "weight decay on s"),
        ('{"params": scales, "lr": lr,', '{"params": scales, "lr": 10 * lr,', "another rate for s"),
        ('"lr": lr, "weight_decay": weight_decay', '"lr": lr, "weight_decay": 0.0', "no weight decay on A and B"),
        ("for p in (m.multilora.A, m.multilora.B)]", "for p in (m.multilora.B,)]", "A is not trained"),
        ("(linear.weight.to(delta.dtype) + delta).to", "linear.weight + delta.to", "merge rounds ΔW first"),
        ("(linear.weight.to(delta.dtype) + delta)", "(linear.weight.to(delta.dtype) - delta)", "merge subtracts ΔW"),
        ("            handle.remove()\n            del linear.", "            del linear.", "merge leaves the hook"),
        ("            del linear.multilora\n", "", "merge leaves A, B and s in the model"),
        ("return output + linear.multilora(args[0])", "return linear.multilora(args[0])", "W x is lost"),
        ("return output + linear.multilora(args[0])", "return output - linear.multilora(args[0])", "update subtracted"),
        ("    model.requires_grad_(False)\n", "", "the base is trained as well"),
        ('[t.strip() for t in config.targets.split(",") if t.strip()]', "LINEARS", "--targets ignored"),
        ("values / values.sum()", "values.square() / values.square().sum()", "singular values squared"),
        ("delta.cpu().double())[:count]", "delta.cpu().double())", "singular values: all instead of count"),
        ("qr(down.T).R.T", "qr(down.T).R", "the core R R' instead of R R'^T"),
        ("singular_values(m.multilora.core()", "singular_values(m.multilora.delta()", "the report makes ΔW"),
        (".clamp_min(torch.finfo(values.dtype).tiny)", "", "singular values of zero are NaN"),
        ("clamp_min(1e-300).log()", "clamp_min(1e-300).log2()", "entropy in bits under exp"),
        ("sum(shares) / len(shares)", "max(shares)", "the largest share instead of the mean"),
        ('rank=12, alpha=24.0, scaling="none"', 'rank=4, alpha=8.0, scaling="none"', "LoRA of another total rank"),
        ('rank=12, alpha=24.0, scaling="none"', 'rank=12, alpha=8.0, scaling="none"', "LoRA with another alpha / r"),
    ),
    "csreft.py": (
        ("first token's\"] = \"prompt_mean\"", "first token's\"] = \"first_token\"",
         "the router reads the first token by default"),
        ("subspaces=1, rank=20, router=False", "subspaces=1, rank=5, router=False", "LoReFT of another total rank"),
        ('return counts["f"], counts["l"]', 'return counts["l"], counts["f"]', "f and l exchanged"),
        ("        q = q * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, "
         ":].to(q.dtype)\n", "", "no signs after the QR"),
        ("upper.diagonal(dim1=-2, dim2=-1) < 0", "upper.diagonal(dim1=-2, dim2=-1) > 0", "the QR's signs turned round"),
        ("        self.R.copy_(q.transpose(-1, -2)",
         "        u, _, v = torch.linalg.svd(rows, full_matrices=False)\n        q = (u @ v).transpose(-1, -2)\n    "
         "    self.R.copy_(q.transpose(-1, -2)", "polar factor instead of QR"),
        ('self.R.flatten(1, 2) if self.config.ortho == "joint" else self.R  # (L',
         'self.R if self.config.ortho == "joint" else self.R.flatten(1, 2)  # (L', "joint and separate exchanged"),
        ("normal_(self.R)\n        self.orthonormalize()\n", "normal_(self.R)\n", "R not orthonormal at the start"),
        ("(self.R)\n", "(self.R[:1])\n        self.R.data[:] = self.R[:1]\n", "every layer starts with the same R"),
        ("W = nn.Parameter(self.R.detach().clone())", "W = nn.Parameter(torch.zeros_like(self.R))", "W starts at zero"),
        ("W = nn.Parameter(self.R.detach().clone())", "W = nn.Parameter(torch.randn_like(self.R))", "W starts random"),
        ("nn.Parameter(self.R.detach().clone())", "nn.Parameter(self.R.detach())", "W and R share their memory"),
        ("(torch.zeros(len(layers), k, r, **like))", "(torch.ones(len(layers), k, r, **like))", "b starts at one"),
        ("torch.promote_types(weight.dtype, torch.float32)", "weight.dtype", "trained tensors in the base's dtype"),
        ("torch.promote_types(weight.dtype, torch.float32)", "torch.float32", "float32 tensors beside a float64 base"),
        ("nn.Linear(d, d // 2, **like), nn.ReLU(), nn.Linear(d // 2, k, **like)",
         "nn.Linear(d, d, **like), nn.ReLU(), nn.Linear(d, k, **like)", "the router's hidden width is d"),
        ("nn.Linear(d, d // 2, **like), nn.ReLU()", "nn.Linear(d, d // 2, **like), nn.Tanh()", "tanh for relu"),
        ("(), nn.Linear(d // 2, k, **like)", "(), nn.Linear(d // 2, k, bias=False, **like)", "the router without c_2"),
        ("        h = h.to(self.R.dtype)\n        if", "        if", "x in the embedding's dtype"),
        ("x = h[:, 0]", "x = h[:, 1]", "the first token read one off"),
        ("x = h[:, 0]", "x = h[:, -1]", "the last token for the first"),
        ('route_on == "first_token"', 'route_on != "first_token"', "prompt_mean and first_token exchanged"),
        ("torch.where(prompt[..., None], h, 0.0).sum(1) / prompt.sum(1, keepdim=True)", "h.mean(1)",
         "the mean over answers and padding too"),
        ("0.0).sum(1) / prompt.sum(1, keepdim=True)", "0.0).mean(1)", "the prompt's sum over all T tokens"),
        ("F.rms_norm(x, x.shape[-1:]) if self.config.router_norm else x", "x", "the router's input as it is"),
        ("(x, x.shape[-1:]) if self.config.router_norm else x", "(x, x.shape[-1:])", "--no-router-norm ignored"),
        ("F.rms_norm(x, x.shape[-1:]) if", "F.layer_norm(x, x.shape[-1:]) if", "layer norm for root mean square"),
        ("F.rms_norm(x, x.shape[-1:]) if", "F.normalize(x, dim=-1) if", "unit length for unit root mean square"),
        ("        if ctx.decoding:\n            return\n", "", "gates made anew for each generated token"),
        ("prompt = torch.ones(h.shape[:2]", "prompt = torch.eye(*h.shape[:2]",
         "without a prompt mask one token is the prompt"),
        ("(len(h), k, dtype=self.R.dtype)", "(len(h), k, dtype=self.R.dtype) / k", "every gate 1/k without a router"),
        ("self.read(h, prompt)).sigmoid()", "self.read(h, prompt)).softmax(-1)", "softmax for sigmoid"),
        ("sigmoid()", "sigmoid().detach()", "gates detached: the router never learns"),
        ("(h.device.type, enabled=False)", "(h.device.type, torch.bfloat16)", "the router under autocast"),
        ('self.config.gate == "hard" and not self.training:', 'self.config.gate == "hard":', "hard gates in training"),
        ('if self.config.gate == "hard" and not self.training:', "if False:", "--gate hard ignored"),
        ("(gates > 0.5)", "(gates > 0.0)", "hard gates always open"),
        ("(gates > 0.5)", "(gates < 0.5)", "hard gates turned round"),
        ("device=h.device) != self.off)", "device=h.device) == self.off)", "off leaves one gate alone open"),
        ("if self.off is not None:", "if self.off:", "subspace 0 cannot be switched off"),
        ("((place < first) |", "((place <= first) |", "one token too many at the front"),
        ("(place >= length - last)", "(place > length - last)", "one token too few at the end"),
        ("(place >= length - last)", "(place >= h.shape[1] - last)", "the batch's end for the prompt's"),
        ("(place >= length - last)) & prompt", "(place >= length - last))", "tokens after the prompt edited too"),
        ("ctx.decoding:\n            return h", "False:\n            return h", "generated tokens edited with f1+l1"),
        ("if self.positions is not None and ctx.decoding:", "if ctx.decoding:", "generated tokens never edited"),
        ("F.linear(h, W - R, b)", "F.linear(h, W - R)", "b is left out"),
        ("F.linear(h, W - R, b)", "F.linear(h, W, b)", "- R h is left out"),
        ("F.linear(h, W - R, b)", "F.linear(h, W - R.detach(), b)", "R detached in R h"),
        ("update * gates.to(update.dtype), R.T", "update * gates.to(update.dtype), W.T", "back by W^T instead of R^T"),
        ("update * gates.to(update.dtype), R.T)", "update, R.T)", "gates are not used"),
        (".repeat_interleave(r, dim=1)[:, None]", ".repeat(1, r)[:, None]", "a row has another subspace's gate"),
        ('update = torch.where(ctx.memory["edited"][..., None], update, 0.0)\n', "pass\n", "--positions ignored"),
        ("return h + update.to(h.dtype)", "return update.to(h.dtype)", "h is lost"),
        ('if r * (k if config.ortho == "joint" else 1) > d', "if r * k > d", "--ortho separate refused where it fits"),
        ('if r * (k if config.ortho == "joint" else 1) > d:', "if r > d:", "more joint rows than the width"),
        ("CSReFT(model, config, self.layers).train(model.training)", "CSReFT(model, config, self.layers)",
         "edits in training mode beside a model in evaluation"),
        ("prepare_steps = 4 if self.edits.router else 0", "prepare_steps = 0", "constant gates are not noticed"),
        ("layers[0].", "layers[self.layers[0]].", "the router reads the first edited layer's input"),
        ("layers[number].register_forward_hook", "layers[i].register_forward_hook", "--layers 3,9 edited elsewhere"),
        ("register_forward_hook", "mlp.register_forward_hook", "the MLP's output edited instead of the layer's"),
        ("self.edits.edit(i, h, args[1])", "self.edits.edit(0, h, args[1])", "every layer has the first layer's edit"),
        ("([W], lr, weight_decay), ([R, b], lr, 0.0)", "([W, R], lr, weight_decay), ([b], lr, 0.0)",
         "weight decay on R"),
        ("([W], lr, weight_decay), ([R, b], lr, 0.0)", "([R, b, W], lr, 0.0)", "no weight decay on W"),
        ("router_lr, weight_decay", "lr, weight_decay", "--router-lr ignored"),
        ("router_lr, 0.0", "router_lr, weight_decay", "weight decay on the router's biases"),
        ("atol=1e-6))", "atol=1e6))", "every router is called constant"),
        ('ctx.memory["gates"].mean() if', 'ctx.memory["gates"].sum() if', "the sum of the gates as penalty"),
        ('ctx.memory["gates"].mean() if', 'ctx.memory["gates"].detach().mean() if', "the penalty detached"),
        ('ctx.memory["gates"].mean()', '(ctx.memory["gates"] - 0.5).square().mean()', "the released code's penalty"),
        ("return self.config.sparsity * ctx", "return ctx", "the penalty without λ"),
        ("(self):\n        self.edits.orthonormalize()", "(self):\n        pass", "no QR after a step"),
        ('        raise UserError("CS-ReFT cannot be merged', '        return str("CS-ReFT cannot be merged',
         "merge does nothing and says nothing"),
        ('R.flatten(1, 2) if self.config.ortho == "joint" else R\n', "R\n", "error of each subspace alone"),
        ("(self.edits.R, self.edits.W, self.edits.b))", "(self.edits.W, self.edits.b))", "R is not counted"),
        ("    model.requires_grad_(False)\n", "", "the base is trained as well"),
    ),
    "cofitune.py": (
        ("shares = sorted(float(part)", "shares = list(float(part)", "shares in the order of asking"),
        ('layers="all", modules="all", mask_on', 'layers="50%-100%", modules="all", mask_on', "SFT of half the layers"),
        ('"what 1 - I multiplies"] = "update"', '"what 1 - I multiplies"] = "grad"', "the gradient masked by default"),
        ('RANGES = ("0%-50%", "25%-75%", "50%-100%")', 'RANGES = ("0%-50%", "50%-100%")', "the middle range left out"),
        ('"25%-75%": ("25%-50%", "50%-75%")', '"25%-75%": ("25%-50%", "75%-100%")', "a quarter outside the winner"),
        ('SHARES = "0.25,0.5,0.75,1"', 'SHARES = "0.5,1"', "half of the shares left out"),
        ('SHARES = "0.25,0.5,0.75,1"', 'SHARES = "1"', "nodes scored at their full step alone"),
        ("return 2 * S * V / (S + V), math", "return (S + V) / 2, math", "nodes compared by the sum"),
        ("return 2 * S * V / (S + V),", "return math.sqrt(S * V),", "the geometric mean for the harmonic one"),
        ("2 * V * V / (S + V) ** 2, 2 * S * S /", "2 * S * S / (S + V) ** 2, 2 * V * V /", "dH/dS and dH/dV exchanged"),
        ('math.hypot(by_S * point["errors"][0], by_V * point["errors"][1])',
         'by_S * point["errors"][0] + by_V * point["errors"][1]', "errors added, not their squares"),
        ("    if S + V == 0:\n        return 0.0, 0.0\n", "", "H of a node that can do nothing"),
        ('modules=modules, mask_on="none", shares=', "modules=modules, shares=", "the search's nodes masked"),
        ("steps=config.search_steps, lr=config.search_lr", "steps=800, lr=config.search_lr", "--search-steps ignored"),
        ("key=harmonic", 'key=lambda p: p["speciality"] + p["versatility"]', "the best share by the sum"),
        ('p in results["points"] if p["share"]', 'p in results["points"][-1:]', "the full step for the best share"),
        ('score("all", "all", "0," + SHARES)', 'score("all", "all", "0,1")', "SFT at its full step alone"),
        ('("base", ""): everything[0]', '("base", ""): everything[-1]', "the base's row is SFT's"),
        ("RANGES for modules in KINDS.values()", 'RANGES for modules in [KINDS["FFN"]]', "attention is not searched"),
        ("(quarter, node[1]) for", '(quarter, KINDS["FFN"]) for', "quarters with the MLP, whatever won"),
        ("for part in PARTS[node[1]]", 'for part in PARTS[KINDS["FFN"]]', "the MLP's modules, whatever won"),
        ("max(path[-1:] + nodes, key", "max(nodes, key", "a child always replaces its parent"),
        ("path[-1:] + nodes, key", "nodes + path[-1:], key", "a child that is only as good replaces its parent"),
        ("config, layers=chosen[0], modules=chosen[1]", "config, layers=chosen[0]", "the search's modules are dropped"),
        ("chosen[0], modules=chosen[1]", 'chosen[0], modules=chosen[1], mask_on="none"', "no mask after a search"),
        ("rival > H - error", "rival > H", "rivals without the standard error"),
        ('uni = point["speciality"] + point["versatility"]', "uni = harmonic(point)[0]", "H in Uni's column"),
        ('("q_proj", "k_proj", "v_proj")', '("q_proj", "k_proj", "v_proj", "o_proj")', "heads as units of o"),
        ("return linear.out_features // config.head_dim if by_head else linear.out_features",
         "return linear.out_features", "single outputs as units of q, k and v"),
        ("g.repeat_interleave", "g.repeat", "a head's mask on every fourth output"),
        ("for block in (layer.self_attn, layer.mlp):", "for block in (layer.mlp,):", "no dropout on attention"),
        ("for block in (layer.self_attn, layer.mlp):", "for block in (layer.self_attn,):", "no dropout on the MLP"),
        ("for block in (layer.self_attn, layer.mlp):", "for block in (layer,):", "dropout on the layer's output"),
        ("F.dropout(output, dropout)", "F.dropout(output, 0.1)", "--importance-dropout ignored"),
        ("        for batches in steps:", "        for batches in [next(iter(steps))]:", "importance from one batch"),
        ("two_pass_kl(model, batch) / labelled", "two_pass_kl(model, batch)", "the KL's sum instead of its mean"),
        ("two_pass_kl(model, batch) / labelled", "two_pass_kl(model, batch) / (batch.labels[:, 1:] != -100).sum()",
         "each micro-batch's own mean"),
        ("sum(parts).abs()", "sum(part.abs() for part in parts)", "|.| before the micro-batches are summed"),
        ("raw[name] + sum(parts).abs()", "raw[name] + sum(parts)", "signed gradients of the batches add up"),
        ("            handle.remove()\n    scores", "            pass\n    scores", "importance leaves its hooks"),
        ("mean.std(unbiased=False)", "mean.std()", "the standard deviation with n - 1"),
        ("if deviation > 0 else torch.zeros_like(mean)", "", "equal scores give NaN"),
        ("z.tanh().abs()", "z.tanh()", "I without |.|"),
        ("z.tanh().abs()", "z.sigmoid()", "sigmoid for |tanh|"),
        ("z = (mean - mean.mean()) / deviation", "z = mean / deviation", "z without the mean taken away"),
        ("(log_p2.exp() * (log_p2 - log_p1)).sum", "(log_p1.exp() * (log_p1 - log_p2)).sum", "KL the other way round"),
        ("exp() * (log_p2 - log_p1)", "exp() * (log_p2 - log_p1.detach())", "no gradient through the first pass"),
        ("prepare_steps = config.importance_batches if", "prepare_steps = 1 if", "--importance-batches ignored"),
        ('        if self.config.mask_on == "none":\n            return\n', "",
         "--mask-on none measures the importance"),
        ("1 - score for name, score in scores.", "score for name, score in scores.", "the mask is I instead of 1 - I"),
        ('if self.config.mask_source == "random":', "if False:", "--mask-source random ignored"),
        ("score[torch.randperm(len(score)).to(score.device)]", "torch.rand_like(score)",
         "the random mask has other values"),
        ("mask.repeat_interleave", "mask.repeat", "a head's rows have other heads' masks"),
        ("self.linears[name].weight, self.linears[name].bias", "self.linears[name].weight,", "biases are not masked"),
        ('== "grad":\n            for p, mask in self.masked():\n                p.grad.mul_(mask)\n        elif',
         '!= "":\n            for p, mask in self.masked():\n                p.grad.mul_(mask)\n        if',
         "--mask-on update masks the gradient too"),
        ("detach().clone() for p, _ in self.", "detach() for p, _ in self.", "the old weights move with the new ones"),
        ("p.copy_(old + mask * (p - old))", "p.copy_(old + (1 - mask) * (p - old))", "the step masked by I"),
        ("p.copy_(old + mask * (p - old))", "p.copy_(mask * p)", "weights masked instead of the step"),
        ('f"importance.{name}": 1 - mask for', 'f"importance.{name}": mask for', "1 - I saved as the importance"),
        ('saved | {f"importance.{name}": 1 - mask for name, mask in self.masks.items()}', "saved",
         "the importance is not saved"),
        ("in scores.items()}\n\n    def merge", "in {}.items()}\n\n    def merge", "a continued run loses its mask"),
        ("            p.data = p.data.to(self.dtypes[name])", "            pass", "merged weights stay in float32"),
        ("self.base[name].to(p.dtype), end[name]", "end[name], self.base[name].to(p.dtype)", "shares of the way back"),
        ("found = scores if share == 1 else score()", "found = scores", "every share has the end's scores"),
        ("p.copy_(end[name])\n        return", "pass\n        return", "weights left at the last share"),
        ("sum(m * n for m, n in sizes) / sum(n for _, n in sizes)", "sum(m for m, _ in sizes) / len(sizes)",
         "mean mask over the modules"),
        ('(f"model.layers.{i}." for i in layers)', '(f"model.layers.{i}" for i in layers)', "layer 11 for layer 1"),
        ("    linears = {name: m for name, m in linears.items() if name.startswith(inside)}\n", "", "--layers ignored"),
        ("p in m.named_parameters()", 'p in m.named_parameters() if key == "weight"', "biases are not trained"),
        ("trained = dict(model.named_parameters())  # emb",
         "trained = dict(model.model.layers.named_parameters())  # emb", "SFT without embeddings, norm and head"),
        ("    model.requires_grad_(False)\n", "", "everything is trained"),
    ),
    "model.py": (
        ("F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)",
         "self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)", "eps outside the root"),
        ("[-1:], self.weight.to(x.dtype), self.eps", "[-1:], self.weight.to(x.dtype), 1e-6", "rms_norm_eps ignored"),
        ('return freq / scaling["factor"]', 'return freq * scaling["factor"]', "RoPE linear times the factor"),
        (".float() / config.head_dim\n", ".float() / config.hidden_size\n", "frequencies over d instead of hd"),
        ("(waves - low) / (high - low)).clamp(0, 1)", "(waves - low) / (high - low))",
         "llama3 blends outside its band"),
        ("freq * (blend + (1 - blend) / scaling", "freq * (1 - blend + blend / scaling", "llama3's ends exchanged"),
        ("cos + x.roll(x.shape[-1] // 2, -1)", "cos - x.roll(x.shape[-1] // 2, -1)", "rotation the other way round"),
        ("x.roll(x.shape[-1] // 2, -1)", "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)", "neighbours as rotary pairs"),
        ("torch.arange(ids.shape[1], device=ids.device)[None]\n        angles",
         "1 + torch.arange(ids.shape[1], device=ids.device)[None] * 2\n        angles", "every other position"),
        ("v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)",
         "v = rotate(self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), cos, sin)", "values rotated too"),
        ("        y = F.scaled",
         "        k, v = (t.repeat(1, q.shape[1] // k.shape[1], 1, 1) for t in (k, v))\n        y = F.scaled",
         "key-value heads dealt out in turn"),
        ("is_causal=ctx.mask is None", "is_causal=False", "no causal mask"),
        ("[1] != k.shape[1]", "[1] != k.shape[1], scale=self.head_dim**-1.0", "scores over hd instead of its root"),
        ("y.transpose(1, 2).reshape(B, T, -1)", "y.transpose(2, 3).reshape(B, T, -1)", "heads put together wrongly"),
        ("silu(self.gate_proj(x)) * self.up_proj", "silu(self.up_proj(x)) * self.gate_proj", "gate and up exchanged"),
        ("F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", "gelu for silu"),
        ("self.mlp(self.post_attention_layernorm(h))", "self.mlp(self.input_layernorm(h))", "one norm for both blocks"),
        ("        return self.norm(h)\n", "        return h\n", "no norm at the end"),
        ("labels.flatten()[where + 1]", "labels.flatten()[where]", "labels without the shift"),
        ("(labels[:, 1:] != -100)", "(labels[:, :-1] != -100)", "labelled positions one off"),
        ("else total / len(h)", "else total / ids.numel()", "mean over all tokens"),
        ("(h.split(rows), y.split(rows)):", "(h.split(rows)[:1], y.split(rows)):", "the loss of the first piece alone"),
        ("(slots < T)", "(slots < 0)", "generation sees the padding"),
        ("[rows] + step", ".max() + step + 0 * lengths[rows]", "generated positions from the longest prompt"),
        ("found[rows, step] = token", "found[: len(rows), step] = token", "tokens of rows that moved up"),
        ("k, v = stored if ctx.decoding else (k, v)", "pass", "the cache is not read"),
        ("[torch.arange(B, device=self.device), lengths - 1]", "[:, -1]", "continues after the padding"),
        ("logits / temperature", "logits * temperature", "temperature times the logits"),
        ("row[: next((i for", "row[: next((i + 1 for", "the token that ends a row is returned"),
        ("lo <= (i + 0.5) / count < hi", "lo <= i / count < hi", "layer ranges by their lower edge"),
        ("lo <= (i + 0.5) / count < hi", "lo < (i + 0.5) / count <= hi", "layer ranges at their boundaries"),
        ("if not layers or layers[0] < 0 or", "if not layers or", "negative layers"),
        ("self.lm_head.weight = self.model.embed_tokens.weight", "pass", "tied weights are two"),
        ("self.head_dim = self.head_dim or", "self.head_dim =", "head_dim of config.json ignored"),
        ('"lr": lr, "weight_decay": 0.0', '"lr": lr, "weight_decay": weight_decay', "weight decay on norms and biases"),
        ("h, ctx = self.embed_tokens(ids), replace(ctx)", "h = self.embed_tokens(ids)", "a pass writes on its Context"),
        ("if max(map(len, prompts)) + max_new_tokens >", "if max(map(len, prompts)) >", "more tokens than positions"),
    ),
    "data.py": (
        ("p * (100 - p) / len(", "p * (100 - p) / 50 / len(", "errors of other sizes"),
        ("sum(g.values()) / len(g) if g else None", "sum(g.values()) if g else None", "sums for means of groups"),
        ('and self.score[task].unit == "%"}', "}", "losses in the group means"),
        ("prompt = max(1, prompt)", "prompt = prompt", "a loss on the very first token"),
        ("if end > start), len(ids))", "if end >= start), len(ids))", "the prompt's last token trained on"),
        ("encoded(e, segments[:-1], text)", "encoded(e, segments, text)", "a choice is ranked with its EOS"),
        ("min(over, max(0, e.prompt - longest // 2))", "over", "a cut may take the whole prompt"),
        ("one.ids[:1] + one.ids[1 + front :]", "one.ids[front :]", "a cut takes BOS"),
        ("rng.sample(examples, len(examples))", "rng.choices(examples, k=len(examples))", "an epoch draws some twice"),
        ("        chunk.sort(key=lambda e: int(math.log(len(e.ids), 1.5)))\n", "", "lengths mixed in a batch"),
        ("        rng.shuffle(parts)\n", "", "short batches first, always"),
        ("e.labels + [-100] * (T - len(e.ids))", "e.labels + [pad] * (T - len(e.ids))", "a loss on padding"),
        ("[e.prompt for e in group]", "[len(e.ids) for e in group]", "the answer in the prompt mask"),
        ("if max(saved, default=0) > cost", "if max(saved, default=0) > 99 * cost", "no cut into micro-batches"),
        ("misses == 0)", "misses <= 1)", "one wrong token counts as right"),
        ("percent([hit and not e.cut for", "percent([hit for", "an answer that was cut counts as right"),
        ("len(c.gold.strip().encode())", "len(c.gold.strip())", "by character instead of byte"),
        ("/ sum(n for _, n, _ in scores)", "/ len(scores)", "the loss of an example instead of a token"),
        ("math.exp(min(value, 700))", "2 ** min(value, 700)", "perplexity of bits"),
    ),
    "train.py": (
        ("if p.dtype in (torch.bfloat16, torch.float16)", "if False", "weights of a bfloat16 base trained in bfloat16"),
        ("(config.batch_size * config.grad_accum)", "config.grad_accum", "epochs of single examples"),
        ("peak * schedule(step, config)", "config.lr * schedule(step, config)", "every group at --lr"),
        ('part["lr"] = peak * schedule(step, config)', 'part["lr"] = peak', "a constant rate"),
        ("config.clip or math.inf", "config.clip", "--clip 0 stops all training"),
        ("                adapter.before_step()\n                optimizer.step()\n",
         "                optimizer.step()\n                adapter.before_step()\n", "before_step after the step"),
        ("                adapter.after_step()\n", "", "after_step is not called"),
        ("            optimizer.zero_grad()\n", "", "gradients of all steps add up"),
        ("loss(batch) / labelled", "loss(batch) / (batch.labels != -100).sum()", "each micro-batch's own mean"),
        (" * (len(part) / examples)", "", "the penalty once for each micro-batch"),
        ("adapter.penalty(batch.ctx), part)", "0.0, part)", "no penalty"),
        ("islice(draw(), done, None)", "draw()", "a continued run begins the data anew"),
        ("manual_seed(devices.seed(config.seed, step))", "manual_seed(config.seed)", "every step's dropout equal"),
        ("return min(step / warmup, cosine)", "return cosine", "no warm-up"),
        ("max(1, config.steps - warmup))", "max(1, 2 * (config.steps - warmup)))", "the cosine ends half way"),
        ("    if math.isfinite(loss) and math.isfinite(norm):\n", "    if True:\n", "NaN goes on"),
        ("    model.eval()\n\n\ndef backward", "\n\ndef backward", "training mode after training"),
    ),
}


def wrong_versions(file=None, about=""):
    """[(file, old text, new text, what is wrong)]. Raises UserError for an old text that does not occur once."""
    chosen = [(name, *entry) for name, entries in WRONG.items() if file in (None, name) for entry in entries
              if about in entry[-1]]
    for name, old, new, what in chosen:
        if (count := (HERE / name).read_text(encoding="utf-8").count(old)) != 1 or old == new:
            raise UserError(f"{name}: the text of {what!r} occurs {count} times, expected once: {old!r:.80}")
    return chosen


def first_failure(folder, tests):
    """(test, first line of what it says) of the first of the tests that fails in this copy; None where all pass."""
    settings = {**os.environ, "COLUMNS": "400", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=settings, text=True, capture_output=True, timeout=300)
    except subprocess.TimeoutExpired:
        return tests[0], "no end within five minutes"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    test, _, words = (failed or [done.stdout[-300:]])[0].partition(" - ")
    return test.split(" ", 1)[-1].split("::")[-1], words.removeprefix("AssertionError: ")


def notice(versions):
    """Yields (file, what is wrong, what first_failure gives) for each. Raises UserError where the tests of a file fail
    without any change."""
    with tempfile.TemporaryDirectory() as folder:
        copy = clone(Path(folder) / "project")
        for file in dict.fromkeys(file for file, *_ in versions):
            if failure := first_failure(copy, TESTS[file]):
                raise UserError(f"the tests of {file} fail without a change: {': '.join(failure)}")
        for file, old, new, what in versions:
            text = (copy / file).read_text(encoding="utf-8")
            (copy / file).write_text(text.replace(old, new), encoding="utf-8")
            yield file, what, first_failure(copy, TESTS[file])
            (copy / file).write_text(text, encoding="utf-8")


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", nargs="?", choices=list(WRONG), help="of this file alone")
    parser.add_argument("--about", default="", metavar="WORD", help="those alone whose description has this word")
    args = parser.parse_args()
    counts = {}
    for file, what, failure in notice(wrong_versions(args.file, args.about)):
        counts.setdefault(file, []).append(failure is not None)
        print(f"{'noticed' if failure else 'NOT NOTICED':<12}{file:<14}{what}", flush=True)
        if failure:
            print(f"{'':<12}{failure[0]}: {failure[1]}", flush=True)
    for file, found in counts.items():
        print(f"{file}: {sum(found)} of {len(found)} noticed")
    sys.exit(not all(map(all, counts.values())))


if __name__ == "__main__":
    command_line(main)
