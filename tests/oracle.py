"""A plain, slow, dense oracle of a policy: eager attention, explicit masks, no cache.

One unpadded row at a time. A whole conversation is recomputed in one forward; in each layer its
tokens are processed in order, each with its own visible set, exactly as the A-VL paper's
algorithm words it. Nothing of avlprof's runtime is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from avlprof.policy import CoreScore, Policy

NEAR_TIE = 1e-5
"""Relative score gap under which fp32 may order two tokens either way."""


@dataclass
class Trace:
    """What the oracle chose: kept sets, and the core and text sets after each step; score gaps."""

    kept: dict[int, list[set[int]]] = field(default_factory=dict)
    cores: dict[int, list[list[set[int]]]] = field(default_factory=dict)
    text: dict[int, list[list[set[int]]]] = field(default_factory=dict)
    alive: dict[int, int] = field(default_factory=dict)  # tokens of the last turn that enter a layer
    gap: float = math.inf  # smallest relative gap between the last chosen and the first left out


def top(scores: list[float], candidates: list[int], count: int, trace: Trace) -> set[int]:
    """The `count` best candidates, lower position first on ties."""
    ranked = sorted(candidates, key=lambda i: (-scores[i], i))
    if 0 < count < len(ranked):
        last, left = scores[ranked[count - 1]], scores[ranked[count]]
        trace.gap = min(trace.gap, (last - left) / max(abs(last), abs(left), 1e-30))
    return set(ranked[:count])


def per_layer(value, layer):
    return value[layer] if isinstance(value, tuple) else value


def share(ratio, count):
    return math.floor(ratio * count + 1e-6)


class Oracle:
    """Eager attention of one row under a policy; vision and system come from the prompt.

    `answer_types` are the token types that the model gives to generated tokens. Prompts attend
    by the model's own mask where it makes one; sliding layers do so throughout.
    """

    def __init__(
        self, model, policy: Policy, vision_ids: tuple[int, ...], answer_types: dict[str, int] | None = None
    ) -> None:
        self.model, self.policy, self.vision_ids = model, policy, vision_ids
        self.answer_types = {"mm_token_type_ids": 0} | (answer_types or {})

    def run(self, inputs: dict[str, Tensor], answer: list[int]) -> tuple[Tensor, Trace]:
        """Logits `[len(answer) + 1, V]` of the tokens behind the prompt, and the sets."""
        logits, trace = self.converse([(inputs, answer)])
        return logits[0], trace

    def converse(self, turns: list[tuple[dict[str, Tensor], list[int]]]) -> tuple[list[Tensor], Trace]:
        """The same for several turns, each `(inputs, answer)`; one tensor of logits a turn."""
        full = joined(turns, self.answer_types)
        ids = full["input_ids"][0].tolist()
        self.turns, at = [], 0
        for inputs, answer in turns:
            end = at + inputs["input_ids"].shape[1]
            self.turns.append((at, end, end + len(answer)))
            at = end + len(answer)
        given = {i for start, end, _ in self.turns for i in range(start, end)}
        self.vision = {i for i in given if ids[i] in self.vision_ids}
        first = min(self.vision, default=len(ids))
        self.system = {i for i in given if i < first}
        self.told: dict[int, dict[int, dict[int, float]]] = {}
        self.dropped: set[int] = set()
        self.next_dropped: set[int] = set()
        self.trace = Trace()
        AttentionInterface.register("test_oracle", self._attention)
        AttentionMaskInterface.register("test_oracle", sdpa_mask)
        before = self.model.config.get_text_config()._attn_implementation
        self.model.set_attn_implementation({"text_config": "test_oracle"})
        try:
            with torch.no_grad():
                logits = self.model(**full, use_cache=False).logits[0]
        finally:
            self.model.set_attn_implementation({"text_config": before})
        return [logits[end - 1 : last] for _, end, last in self.turns], self.trace

    def _attention(
        self, module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs
    ):
        heads, groups = query.shape[1], key.shape[1]
        k = key.repeat_interleave(heads // groups, dim=1)[0].double()
        v = value.repeat_interleave(heads // groups, dim=1)[0].double()
        total = query.shape[2]
        logits = query[0].double() @ k.mT * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        seen = torch.ones(total, total, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = attention_mask[0, 0]
        if getattr(module, "sliding_window", None) is not None:
            hidden = logits.masked_fill(~seen, -math.inf)
            out = torch.zeros(heads, total, v.shape[-1], dtype=torch.double)
            for head in range(heads):
                for t in range(total):
                    out[head, t] = shares(hidden[head, t], sink_of(s_aux, head)) @ v[head]
        else:
            scan = Scan(self, module.layer_idx, heads // groups, logits, seen, v)
            scan.sinks = s_aux
            scan.states = query[0].double(), key[0].double(), value[0].double(), scaling, softcap
            out = scan.run()
        return out.transpose(0, 1)[None].to(query.dtype), None


def joined(turns, answer_types):
    """All turns and their answers as the inputs of one forward."""
    full = {}
    for inputs, answer in turns:
        extra = torch.tensor([answer], dtype=torch.long).view(1, -1)
        part = {"input_ids": torch.cat([inputs["input_ids"], extra], dim=1)}
        for name, value in inputs.items():
            if name in answer_types:
                more = torch.full((1, len(answer)), answer_types[name])
                part[name] = torch.cat([value, more], dim=1)
            elif name not in ("input_ids", "attention_mask"):
                part[name] = value
        for name in answer_types:
            known = any(name in other for other, _ in turns)
            if known and name not in part:
                part[name] = torch.zeros_like(part["input_ids"])
        for name, value in part.items():
            wide = value.shape[:1] == (1,) and value.shape == part["input_ids"].shape
            full[name] = torch.cat([full[name], value], dim=1 if wide else 0) if name in full else value
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    return full


def to_middle(number):
    """How far a number is from where half precision rounds it to another one; 0 is never."""
    if number == 0:
        return math.inf
    spacing = 2.0 ** (math.floor(math.log2(abs(number))) - 10)
    return spacing / 2 - abs(float(number) - float(number.half()))


def quantised(numbers, bits, trace):
    """A token's numbers after few bits: the nearest steps between the least and the largest of a group."""
    found, most = [], 2**bits - 1
    group = max(n for n in range(1, 33) if len(numbers) % n == 0)
    for part in numbers.split(group):
        low = part.min().half().double()
        exact = (part.max() - low) / most
        scale = exact.half().double()
        codes = (part - low) / scale if scale > 0 else torch.zeros_like(part)
        near = float((codes.frac().abs() - 0.5).abs().min() * scale)
        trace.gap = min(trace.gap, 10 * near, 10 * to_middle(part.min()), 10 * most * to_middle(exact))
        found.append(codes.round().clamp(0, most) * scale + low)
    return torch.cat(found)


def sink_of(sinks, head):
    """A head's learned sink: its logit; None where the model has none."""
    return None if sinks is None else sinks[head].double()


def shares(logits, sink):
    """Softmax of one row; a learned sink takes its share first, and gives nothing for it."""
    if sink is None:
        return logits.softmax(-1)
    powers = (logits - max(logits.max(), sink)).exp()
    return powers / (powers.sum() + (sink - max(logits.max(), sink)).exp())


class Scan:
    """One layer, token by token."""

    sinks = None  # learned logits of the heads
    states = None  # queries, keys and values, the factor and the soft cap of the products

    def __init__(self, oracle, layer, size, logits, seen, v):
        self.o, self.policy, self.trace, self.layer = oracle, oracle.policy, oracle.trace, layer
        self.logits, self.seen, self.v = logits, seen, v
        self.heads, self.total = logits.shape[:2]
        per_kv = [list(range(g, g + size)) for g in range(0, self.heads, size)]
        whole = [list(range(self.heads))]
        policy = self.policy
        self.vgroups = whole if policy.heads == "shared" else per_kv
        self.joint = policy.joint
        if self.joint is not None:
            self.tgroups = self.vgroups
            evicts = self.joint.decoding == "evict"
            self.kind = policy.scorer.name if evicts else "grow"
        else:
            self.tgroups = per_kv if policy.text.scorer != "position" else whole
            self.kind = policy.text.scorer if not policy.text.keeps_all else "grow"
        self.out = torch.zeros(self.heads, self.total, v.shape[-1], dtype=torch.double)
        self.system: list[int] = []
        self.kept = [set() for _ in self.vgroups]
        self.core = [set() for _ in self.vgroups]
        self.core_size = 0
        self.packed = [set() for _ in self.vgroups]
        self.size, self.bits = size, per_layer(policy.vision_bits, layer)
        self.text = [[] for _ in self.tgroups]
        self.h = [{} for _ in self.tgroups]
        self.first = [{} for _ in self.vgroups]  # what the scorer gave at a token's turn
        self.mean = [{} for _ in self.vgroups]
        self.seen_text = self.pool = 0
        leads = self.policy.refresh_layers
        self.lead = layer if leads is None else max([lead for lead in leads if lead <= layer], default=None)
        self.followed = leads is not None and layer in leads and layer + 1 not in leads
        self.o.told[layer] = {}
        self.choice = None

    def run(self):
        self.trace.cores[self.layer], self.trace.text[self.layer] = [], []
        for start, end, last in self.o.turns:
            self.turn(start, end)
            for step, t in enumerate(range(end, last), 1):
                self.step(t, step)
        self.trace.kept[self.layer] = self.kept
        return self.out

    def attend(self, t, visible):
        """Attend from row t, each head to its own set; returns the weights `[heads, total]`."""
        spread = torch.zeros(self.heads, self.total, dtype=torch.double)
        for head in range(self.heads):
            columns = sorted(visible(head))
            row = shares(self.logits[head, t, columns], sink_of(self.sinks, head))
            spread[head, columns] = row
            self.out[head, t] = row @ self.v[head, columns]
        return spread

    def held(self, head, vision):
        vg = next(i for i, g in enumerate(self.vgroups) if head in g)
        tg = next(i for i, g in enumerate(self.tgroups) if head in g)
        return {*self.system, *vision[vg], *self.text[tg]}

    def turn(self, start, end):
        policy, trace, vision_all = self.policy, self.trace, self.o.vision
        self.choice = None
        for step in policy.prefill_filter:
            if step.after_layer == self.layer:
                self.o.dropped |= self.o.next_dropped
        alive = [i for i in range(start, end) if i not in self.o.dropped]
        trace.alive[self.layer] = len(alive)
        weights = {}
        for t in alive:
            weights[t] = self.attend(
                t,
                lambda head: {j for j in {*self.held(head, self.kept), *alive} if self.seen[t, j]},  # noqa: B023
            )
        new = [i for i in range(start, end) if i in vision_all]
        here = [i for i in new if i in alive]
        scores = self.scores(weights, end)
        for step in policy.prefill_filter:
            if step.after_layer == self.layer + 1:
                wanted = min(share(step.keep, len(new)), len(here))
                left = top(scores.mean(0).tolist(), here, wanted, trace)
                self.o.next_dropped |= set(here) - left
        if self.joint is not None:
            self.joint_turn(start, end, weights, scores)
            return
        self.system += [i for i in alive if i in self.o.system]
        keep = min(share(per_layer(policy.vision_keep, self.layer), len(new)), len(here))
        compute = policy.vision_keep if policy.vision_compute is None else policy.vision_compute
        core_size = min(share(per_layer(compute, self.layer), len(new)), keep)
        self.core_size += core_size
        pairs = self.pairs(scores, here, keep) if policy.heads == "adaptive" else []
        for g, found in enumerate(pairs):
            self.kept[g] = self.kept[g] | found
            self.core[g] = set(self.kept[g])
        for g, members in enumerate([] if pairs else self.vgroups):
            best = scores[members].mean(0).tolist()
            self.first[g] |= {j: best[j] for j in here}
            self.kept[g] = self.kept[g] | top(best, here, keep, trace)
            if start > 0:
                best = weights[end - 1][members].mean(0).tolist()
            self.core[g] = top(best, sorted(self.kept[g]), self.core_size, trace)
        self.pack()
        trace.cores[self.layer].append(list(self.core))
        text = [i for i in alive if i not in vision_all and i not in self.o.system]
        self.seen_text += len(text)
        if (bits := per_layer(policy.text.bits, self.layer)) != 16:
            said = [i for i in alive if i in self.o.system]
            self.degrade([*said, *text], range(self.heads), bits)
        self.score_rows(text, text, weights)
        for g in range(len(self.tgroups)):
            self.text[g] = self.cut([*self.text[g], *text], g)
        trace.text[self.layer].append([set(t) for t in self.text])

    def pairs(self, scores, here, keep):
        """What each KV head keeps where they differ in how many: its floor, then the best of all pairs."""
        policy, groups = self.policy, len(self.vgroups)
        means = [scores[members].mean(0).tolist() for members in self.vgroups]
        parts = [1.0] * groups if policy.head_shares is None else policy.head_shares[self.layer]
        found = [
            top(means[g], here, min(share(policy.head_floor * parts[g], keep), len(here)), self.trace)
            for g in range(groups)
        ]
        rest = [(g, j) for j in here for g in range(groups) if j not in found[g]]
        left = top(
            [means[g][j] for g, j in rest],
            list(range(len(rest))),
            groups * keep - sum(map(len, found)),
            self.trace,
        )
        for g, j in (rest[at] for at in left):
            found[g].add(j)
        return found

    def joint_turn(self, start, end, weights, scores):
        tokens = list(range(start, end))
        size = min(len(tokens), max(share(per_layer(self.joint.keep, self.layer), len(tokens)), 1))
        self.pool += size
        if self.kind in ("accumulated", "last_query"):
            self.score_rows(tokens, tokens, weights)
        for g, members in enumerate(self.tgroups):
            if self.kind == "grow":
                best = scores[members].mean(0).tolist()
                sink = min(self.joint.sink, size) if start == 0 else 0
                newest = min(self.joint.recent or int(self.joint.recent_share * size + 1e-6), size - sink)
                self.text[g] = self.text[g] + sorted(self.choose(tokens, best, size, sink, newest))
            else:
                self.text[g] = self.cut([*self.text[g], *tokens], g, self.pool)
        self.trace.cores[self.layer].append([set() for _ in self.core])
        self.trace.text[self.layer].append([set(t) for t in self.text])

    def step(self, t, step):
        policy, trace = self.policy, self.trace
        self.seen_text += 1
        for text in self.text:
            text.append(t)
        if self.kind == "position":  # what falls out of a window falls out before the step attends
            self.text = [self.cut(text, g) for g, text in enumerate(self.text)]
        cored = policy.refresh_interval > 0 and any(len(k) > self.core_size for k in self.kept)
        refresh = self.due(t, step, cored)
        full = refresh and policy.refresh == "full"
        if refresh and self.lead != self.layer:
            told = self.o.told[self.lead][t]
            row = torch.zeros(self.heads, self.total, dtype=torch.double)
            for j, weight in told.items():
                row[:, j] = weight
            self.average(row, [kept & set(told) for kept in self.kept])
            self.pick(row)
        elif refresh and not full:
            before = self.out.clone()
            row = self.attend(t, lambda head: self.held(head, self.kept))
            if self.followed:
                self.o.told[self.layer][t] = {
                    j: sum(
                        float(row[members, j].mean()) * (j in self.kept[g])
                        for g, members in enumerate(self.vgroups)
                    )
                    / len(self.vgroups)
                    for j in set().union(*self.kept)
                }
            self.average(row, self.kept)
            self.pick(row)
            if policy.refresh == "triggered":
                self.remember(t, step, row)
            self.out = before
        row = self.attend(t, lambda head: self.held(head, self.kept if full else self.core))
        if full:
            self.average(row, self.kept)
            self.pick(row)
        elif cored and not refresh:
            self.average(row, self.core)
        if self.kind in ("history", "accumulated", "last_query"):
            self.update(t, row)
            self.text = [self.cut(text, g) for g, text in enumerate(self.text)]
        trace.cores[self.layer].append(list(self.core))
        trace.text[self.layer].append([set(text) for text in self.text])

    def due(self, t, step, cored):
        """Whether a step picks the core anew."""
        policy = self.policy
        if self.lead is None:
            return False
        if self.lead != self.layer:
            return cored and t in self.o.told[self.lead]
        if not (cored or self.followed):
            return False
        if policy.refresh != "triggered":
            return step % policy.refresh_interval == 0
        if self.choice is None:
            return True
        fallen = self.choice["share"] - self.estimate(t)
        if step - self.choice["step"] < policy.refresh_interval:
            return False
        self.trace.gap = min(self.trace.gap, abs(fallen - policy.refresh_margin) / policy.refresh_margin)
        return fallen >= policy.refresh_margin

    def remember(self, t, step, row):
        """What the core holds of a row, and where it lies from the rest, by head."""
        query, key, _, scaling, _ = self.states
        self.choice = {"step": step, "heads": {}}
        for g, members in enumerate(self.vgroups):
            core = sorted(self.core[g])
            rest = sorted(self.kept[g] - self.core[g])
            for head in members:
                kv = head // self.size
                zero = torch.zeros_like(key[kv, 0])
                away = key[kv, rest].mean(0) if rest else zero
                near = key[kv, core].mean(0) if core else zero
                inside, outside = float(row[head, core].sum()), float(row[head, rest].sum())
                odds = math.log((outside + 1e-9) / (inside + 1e-9))
                lean = float(query[head, t] @ (away - near)) * scaling
                self.choice["heads"][head] = (away - near, odds - lean, inside, outside)
        parts = self.choice["heads"].values()
        self.choice["share"] = sum(p[2] for p in parts) / (sum(p[2] + p[3] for p in parts) or 1.0)

    def estimate(self, t):
        """What the core is estimated to hold of a step's vision attention."""
        query, _, _, scaling, _ = self.states
        held = mass = 0.0
        for head, (apart, odds, inside, outside) in self.choice["heads"].items():
            ratio = math.exp(odds + float(query[head, t] @ apart) * scaling)
            held += (inside + outside) / (1 + ratio)
            mass += inside + outside
        return held / (mass or 1.0)

    def average(self, row, seen):
        """Each vision token's mean of the rows that saw it; the older ones fade."""
        fading = self.policy.core_score.memory
        for g, members in enumerate(self.vgroups):
            for j in seen[g]:
                new = float(row[members, j].mean())
                old = self.mean[g].get(j)
                self.mean[g][j] = new if old is None else fading * old + (1 - fading) * new

    def pick(self, row):
        for g, members in enumerate(self.vgroups):
            kept, scores = sorted(self.kept[g]), row[members].mean(0).tolist()
            if self.policy.core_score != CoreScore():
                prompt = self.policy.core_score.prompt
                sums = [sum(part[g].get(j, 0.0) for j in kept) or 1.0 for part in (self.first, self.mean)]
                scores = [0.0] * self.total
                for j in kept:
                    scores[j] += prompt * self.first[g][j] / sums[0]
                    scores[j] += (1 - prompt) * self.mean[g].get(j, 0.0) / sums[1]
            self.core[g] = top(scores, kept, self.core_size, self.trace)
        self.pack()

    def pack(self):
        """Quantise in the open what is kept and not core; what comes back into the core stays as it is."""
        if self.bits == 16:
            return
        for g, members in enumerate(self.vgroups):
            core = set() if self.policy.vision_compute is None else self.core[g]
            self.degrade(self.kept[g] - core - self.packed[g], members, self.bits)
            self.packed[g] = self.kept[g] - core

    def degrade(self, tokens, members, bits):
        """Rows from now on see what `bits` bits leave of tokens in the heads `members`."""
        query, key, value, scaling, softcap = self.states
        for j in tokens:
            for head in members:
                kv = head // self.size
                if head % self.size == 0:
                    key[kv, j] = quantised(key[kv, j], bits, self.trace)
                    value[kv, j] = quantised(value[kv, j], bits, self.trace)
                row = query[head] @ key[kv, j] * scaling
                self.logits[head, :, j] = row if softcap is None else softcap * torch.tanh(row / softcap)
                self.v[head, j] = value[kv, j]

    def update(self, t, row):
        """Scores after a decoding row."""
        for g, members in enumerate(self.tgroups):
            mean = row[members].mean(0)
            text, h = self.text[g], self.h[g]
            if self.kind == "last_query":
                self.h[g] = {j: float(mean[j]) for j in text}
                continue
            q = 0.0
            if self.kind == "history":
                q = float(torch.quantile(mean[text], self.deleted))
            for j in text:
                h[j] = float(mean[j]) if j == t else h[j] + float(mean[j]) - q

    def score_rows(self, rows, columns, weights):
        """Scores after the rows of a turn; older text is scored by them too."""
        if self.kind not in ("history", "accumulated", "last_query"):
            return
        for g, members in enumerate(self.tgroups):
            h = self.h[g]
            for t in rows:
                mean = weights[t][members].mean(0)
                if self.joint is not None and self.kind == "accumulated":
                    for j in [*self.text[g], *columns]:  # a mask may let a row look at later tokens
                        h[j] = h.get(j, 0.0) + float(mean[j])
                    continue
                older = [*self.text[g], *(j for j in columns if j < t)]
                if self.kind == "last_query":
                    self.h[g] = h = {j: float(mean[j]) for j in older}
                    h[t] = float(mean[t])
                    continue
                q = 0.0
                if self.kind == "history" and older:
                    q = float(torch.quantile(mean[older], self.deleted))
                for j in older:
                    h[j] += float(mean[j]) - q
                h[t] = float(mean[t])

    @property
    def deleted(self):
        return 1.0 - per_layer(self.policy.text.keep, self.layer)

    def room(self, pool):
        """Most tokens, sinks, and newest ones that are safe."""
        if self.joint is not None:
            sink = min(self.joint.sink, self.pool)
            limit = max(self.pool, sink + 1) if pool is None else pool
            newest = min(self.joint.recent or int(self.joint.recent_share * limit + 1e-6), limit - sink)
            return limit, sink, newest
        text = self.policy.text
        if text.keep is not None:
            limit = max(round(per_layer(text.keep, self.layer) * self.seen_text), text.minimum)
            return limit, 0, int(text.recent * limit + 1e-6)
        sink, window = per_layer(text.sink, self.layer), per_layer(text.window, self.layer)
        return sink + window + per_layer(text.heavy, self.layer), sink, window

    def cut(self, text, g, pool=None):
        if self.kind == "grow":
            return text
        limit, sink, newest = self.room(pool)
        if len(text) <= limit:
            return text
        scores = self.h[g]
        if self.kind == "position":
            scores = {j: j for j in text}
        return sorted(self.choose(text, scores, limit, sink, newest))

    def choose(self, tokens, scores, count, sink, newest):
        tokens = sorted(tokens)
        safe = {*tokens[:sink], *tokens[len(tokens) - newest :]}
        others = [j for j in tokens if j not in safe]
        return safe | top(scores, others, count - len(safe), self.trace)

    def scores(self, weights, end):
        """Scores `[heads, total]` of a turn's tokens."""
        name = self.policy.scorer.name
        if name == "last_query":
            return weights[end - 1]
        if name == "accumulated":
            return sum(weights.values())
        if name == "position":
            return torch.arange(self.total, dtype=torch.double).expand(self.heads, -1)
        raise AssertionError(name)
