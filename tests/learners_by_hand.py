"""WINGS written out naively with explicit matrices and masks, to test the fast form against: equations 4 and 5 of arXiv 2406.03496."""

import torch
from torch.nn.functional import pad, silu


def rotated(heads, positions, *, base=10000.0):
    """Rotary embedding by complex numbers; dimension i turns with i + half. heads: batch x heads x tokens x head_dim."""
    half = heads.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * frequency
    turned = torch.complex(heads[..., :half], heads[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def lorra(learner, hidden, features, *, query_at, key_at, visible, head_dim):
    """Equation 4: one big matrix for each low-rank map, all attention weights in memory. visible: batch x tokens x features."""
    batch, tokens, dim = hidden.shape
    eye = torch.eye(dim)
    query, key, value = (x @ (eye + part.B @ part.A).T for x, part in ((hidden, learner.q), (features, learner.k), (features, learner.v)))
    heads = -(-dim // head_dim)

    def split(x):
        return pad(x, (0, heads * head_dim - dim)).view(batch, -1, heads, head_dim).transpose(1, 2)

    scores = rotated(split(query), query_at) @ rotated(split(key), key_at).transpose(-1, -2) / head_dim**0.5
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1).nan_to_num()  # no key at all: 0
    out = (weights @ split(value)).transpose(1, 2).reshape(batch, tokens, heads * head_dim)[..., :dim]
    return out @ (learner.o.B @ learner.o.A).T


def attention(host, normed, *, at, allowed, head_dim):
    """The host's attention by hand: its output and its weights (batch x heads x tokens x keys). at: positions; allowed: who sees whom."""

    def heads(linear):
        return linear(normed).unflatten(-1, (-1, head_dim)).transpose(1, 2)

    query, key = rotated(heads(host.q_proj), at), rotated(heads(host.k_proj), at)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), heads(host.v_proj).repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) / head_dim**0.5
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1).nan_to_num()
    return host.o_proj((weights @ value).transpose(1, 2).flatten(2)), weights


def router_weights(gate, weights, *, place, active):
    """Equation 5: ``softmax over learners of SiLU(sum over heads of attention times W, plus b)``. place: each key's column of W."""
    inside = place < gate.in_features
    columns = gate.weight.T[place.clamp(0, gate.in_features - 1)] * inside[..., None]
    scores = silu(weights.sum(dim=1) @ columns + gate.bias).masked_fill(~active, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num()


class ByHand:
    """The logits of a tiny LLaVA with learners, layer by layer.

    at, doc: position and document of each token; text_sees, image_sees: batch x tokens x tokens, which feature a token may
    see, besides that it must be a text (an image) token and no padding. None is what is documented: causal, and no mask.
    """

    def __init__(self, model, batch, *, at=None, doc=None, text_sees=None, image_sees=None, twice=False, routed=True):
        self.model, self.routed, self.factor = model, routed, 2 if twice else 1
        ids = batch["input_ids"]
        self.shape, tokens = ids.shape, ids.shape[1]
        self.valid = batch.get("attention_mask", torch.ones_like(ids)).bool()
        self.image = (ids == model.config.image_token_id) & self.valid
        self.at = torch.arange(tokens).expand(self.shape) if at is None else at
        doc = torch.zeros(self.shape) if doc is None else doc
        together = doc[:, :, None] == doc[:, None, :]
        causal = torch.ones(tokens, tokens).tril().bool() & together
        self.allowed = causal & self.valid[:, None, :]
        self.text_sees = (causal if text_sees is None else text_sees) & (self.valid & ~self.image)[:, None, :]
        self.image_sees = (together if image_sees is None else image_sees) & self.image[:, None, :]
        before = (together & torch.ones(tokens, tokens).tril(-1).bool() & self.valid[:, None, :]).sum(dim=-1)
        self.place = before.masked_fill(~self.valid, 10**6)
        self.features = model.get_input_embeddings()(ids)
        if batch.get("pixel_values") is not None:
            found = torch.cat(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)
            self.features = self.features.masked_scatter(self.image[..., None], found)

    def added(self, mixture, hidden, weights):
        """What one layer's learners add."""
        size = mixture.host.head_dim
        said, active = [], []
        for name, sees in (("image", self.image_sees), ("text", self.text_sees)):
            if name in mixture.learners:
                learner = mixture.learners[name]
                said.append(lorra(learner, hidden, self.features, query_at=self.at, key_at=self.at, visible=sees, head_dim=size))
                active.append(sees.any(dim=-1))
        active += [torch.ones_like(active[0])] * (mixture.router.classes - len(active))
        chosen = torch.stack(active, dim=-1)
        share = chosen.float()
        if self.routed:
            share = router_weights(mixture.router.gate, weights, place=self.place, active=chosen)
        return self.factor * sum(share[..., index : index + 1] * part for index, part in enumerate(said))

    @torch.no_grad()
    def logits(self):
        text, hidden = self.model.model.language_model, self.features
        for layer in text.layers:
            mixture = layer.self_attn
            host = getattr(mixture, "host", mixture)
            out, weights = attention(host, layer.input_layernorm(hidden), at=self.at, allowed=self.allowed, head_dim=host.head_dim)
            hidden = hidden + out
            if host is not mixture:
                hidden = hidden + self.added(mixture, hidden, weights)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(text.norm(hidden))
