"""Claims about sparse feed-forward networks: gating is MM1's, copies change nothing, balance is taught, folders load."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from alula import Collator, Stream, Task, Trainer, TrainSettings
from alula.data.packing import PackingCollator
from alula.data.sample import Sample
from alula.errors import UserError
from alula.experts.gated_products import grouped_outputs, is_gated
from alula.experts.sparse_ffn import ScoreLog, SparseFFN, choose_experts, logged_scores
from alula.experts.upcycling import load_upcycled, routing_statistics, upcycle, valid_tokens
from alula.files import read_jsonl
from alula.methods import METHODS, compose
from alula.models.anatomy import anatomy
from alula.objectives import load_balance_loss, router_z_loss
from resume_worker import collate, pictures, samples
from zoo import build, example_batch

LOOSE = ["blip_2", "florence2"]  # their language models are OPT and BART, whose layers hold fc1 and fc2 themselves
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 40, "num_hidden_layers": 4, **SIZES, **fields})).eval()


def tokens(batch=3, length=11):
    return torch.arange(batch * length).view(batch, length) % 40


def networks(model):
    return [module for module in model.modules() if isinstance(module, SparseFFN)]


@torch.no_grad()
def balance(model, inputs):
    """The mean load-balance loss on a batch."""
    with logged_scores(model) as log:
        model(**inputs)
    return torch.stack([load_balance_loss(scores, inputs["attention_mask"].bool()) for scores in log.take().values()]).mean()


def top2_of_mm1(logits, cf=2.0):
    """The definition as published: [G,S,E] -> gates [G,S,E], load balance, z."""
    _, S, E = logits.shape
    p, capacity = logits.float().softmax(-1), int(S * cf / E)
    m1 = F.one_hot(p.argmax(-1), E).float()
    m2 = F.one_hot((p * (1 - m1)).argmax(-1), E).float()
    g1, g2 = (p * m1).sum(-1), (p * m2).sum(-1)
    lb, z = E * E * (m1.mean(1) * p.mean(1)).mean(), logits.float().logsumexp(-1).square().mean()
    k1 = m1 * (m1.cumsum(1) - m1 < capacity)
    k2 = m2 * (m2.cumsum(1) - m2 + k1.sum(1, keepdim=True) < capacity)
    total = (g1 + g2 + 1e-9)[..., None]
    return g1[..., None] / total * k1 + g2[..., None] / total * k2, lb, z


@pytest.mark.parametrize(("experts", "capacity"), [(4, 2.0), (4, 0.5), (8, 1.0), (3, 1.25), (2, 2.0)])
def test_gating_and_losses_are_those_of_mm1(experts, capacity):
    scores = torch.randn(5, 24, experts) * 2
    scores[..., 0] += 1.5  # a favourite, so that places run out
    gates, balance, z = top2_of_mm1(scores, capacity)
    weights, index = choose_experts(scores, top_k=2, capacity=capacity)
    torch.testing.assert_close(torch.zeros_like(scores).scatter(-1, index, weights.float()), gates, atol=1e-6, rtol=0)
    torch.testing.assert_close(load_balance_loss(scores), balance)
    torch.testing.assert_close(router_z_loss(scores), z)
    places = torch.zeros_like(scores).scatter(-1, index, (weights > 0).float()).sum(1)
    assert places.max() == int(24 * capacity / experts) or (weights > 0).all()
    kept = (weights > 0).all(-1)
    torch.testing.assert_close(weights[kept].sum(-1), torch.ones(int(kept.sum()), dtype=torch.float64))
    assert (choose_experts(scores, top_k=2, capacity=None)[0] > 0).all()


def test_every_expert_has_a_place_in_a_row_shorter_than_the_published_capacity_gives_one():
    weights, index = choose_experts(torch.randn(3, 7, 64), top_k=2, capacity=2.0)  # int(7 * 2 / 64) is 0
    taken = torch.zeros(3, 7, 64).scatter(-1, index, (weights > 0).float()).sum(1)
    assert taken.max() == 1 and (weights[:, 0, 0] > 0).all()


def test_balance_is_one_where_the_load_is_even_and_ignores_padding():
    even = 50.0 * torch.eye(4).repeat(1, 3, 1)
    assert load_balance_loss(even).item() == pytest.approx(1)
    one_sided = torch.zeros(1, 12, 4)
    one_sided[..., 2] = 50.0
    assert load_balance_loss(one_sided).item() == pytest.approx(4)
    valid = torch.tensor([[True] * 12 + [False] * 12])
    for loss in (load_balance_loss, router_z_loss):
        torch.testing.assert_close(loss(torch.cat([even, one_sided], dim=1), valid), loss(even))


def model_and_batch(name):
    """A text-only Llama, or a model of the zoo."""
    if name == "llama":
        return llama(), {"input_ids": tokens()}
    model, processor = build(name)
    return model.eval(), example_batch(name, processor)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "blip_2", "florence2"])
def test_from_copies_the_output_is_the_dense_models_bit_for_bit(name):
    model, batch = model_and_batch(name)
    with torch.no_grad():
        dense = model(**batch).logits
        said = model.generate(**batch, max_new_tokens=4, do_sample=False)
        paths = upcycle(model, experts=4, every=2, top_k=3)
        assert [path.split(".")[-2] for path in paths] == [str(layer) for layer in range(1, anatomy(model).num_layers, 2)]
        assert [path.split(".")[-1] for path in paths] == ["fc1" if name in LOOSE else "mlp"] * len(paths)
        assert torch.equal(model(**batch).logits, dense)
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), said)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {"experts": 1, "top_k": 1}), (torch.bfloat16, {"experts": 4}), (torch.float16, {"top_k": 3})],
    ids=str,
)
def test_with_one_expert_and_in_16_bits_too_the_output_is_the_dense_models_bit_for_bit(dtype, options):
    model, batch = llama().to(dtype), {"input_ids": tokens()}
    with torch.no_grad():
        dense = model(**batch).logits
        upcycle(model, every=1, **options)
        assert len(networks(model)) == 4
        assert torch.equal(model(**batch).logits, dense)


@pytest.mark.parametrize("name", LOOSE)
def test_linears_that_lie_in_the_layer_itself_are_trained_as_one_network(name):
    """Dropout between them moves along, and padding of models that flatten their rows (OPT) counts as little as elsewhere."""
    model, batch = model_and_batch(name)
    layer = model.get_submodule(anatomy(model).layers[1])
    layer.activation_dropout = 0.5
    (path,) = upcycle(model, experts=2, every=2)[:1]
    sparse = model.get_submodule(path)
    assert sparse is layer.fc1 and [expert.dropout for expert in sparse.experts] == [0.5, 0.5] and layer.activation_dropout == 0.0
    model(**batch).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())
    scores = torch.zeros(1, 6, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert valid_tokens(mask, scores).tolist() == [[True, True, False, True, False, False]]


def test_fresh_experts_are_new_and_differ():
    model = llama()
    dense = model.model.layers[1].mlp.up_proj.weight.clone()
    upcycle(model, experts=3, init="fresh")
    first, second, _ = networks(model)[0].experts
    assert not torch.equal(first.up_proj.weight, second.up_proj.weight) and not torch.equal(first.up_proj.weight, dense)
    assert first.up_proj.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.2)


def test_a_sparse_network_is_the_weighted_sum_of_its_experts():
    torch.manual_seed(1)
    ffn = SparseFFN([nn.Linear(6, 6) for _ in range(4)], dim=6, top_k=2, capacity=1.0)
    nn.init.normal_(ffn.gate.weight, std=2.0)
    x = torch.randn(2, 9, 6, requires_grad=True)
    for mode in (True, False):
        ffn.train(mode)
        weights, index = choose_experts(ffn.gate(x), top_k=2, capacity=1.0 if mode else None)
        by_hand = sum(weights[..., s, None] * torch.stack([e(x) for e in ffn.experts], -2).gather(
            -2, index[..., s, None, None].expand(-1, -1, 1, 6)).squeeze(-2) for s in range(2))  # fmt: skip
        torch.testing.assert_close(ffn(x), by_hand.float())
        wanted = torch.autograd.grad(by_hand.square().sum(), [x, *ffn.parameters()])
        found = torch.autograd.grad(ffn(x).square().sum(), [x, *ffn.parameters()])
        torch.testing.assert_close(found, wanted)


def test_grouped_products_give_what_the_loop_gives():
    mlp = llama(hidden_size=32, intermediate_size=64).model.layers[0].mlp
    torch.manual_seed(2)
    experts = nn.ModuleList()
    for _ in range(3):
        experts.append(type(mlp)(LlamaConfig(**{**SIZES, "hidden_size": 32, "intermediate_size": 64})).bfloat16())
    assert all(map(is_gated, experts)) and not is_gated(nn.Linear(4, 4))
    rows, index = torch.randn(20, 32, dtype=torch.bfloat16, requires_grad=True), torch.arange(20) // 8  # 8, 8, 4
    by_hand = torch.cat([expert(rows[index == i]) for i, expert in enumerate(experts)])
    found = grouped_outputs(experts, rows, index)
    torch.testing.assert_close(found, by_hand, atol=2e-2, rtol=2e-2)
    inputs = [rows, *experts.parameters()]
    for one, two in zip(
        torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(by_hand.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, two, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "blip_2"])
def test_an_upcycled_model_is_saved_and_loaded_and_upcycled_no_second_time(tmp_path, name):
    model, batch = model_and_batch(name)
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    with pytest.raises(UserError, match="was not upcycled"):
        load_upcycled(dense)
    upcycle(model, experts=3, every=2, init="fresh", capacity=2.0)
    model.save_pretrained(tmp_path / "sparse")
    loaded = load_upcycled(tmp_path / "sparse", dtype=torch.float32)
    assert type(loaded).__name__ == type(model).__name__ and not loaded.training
    assert networks(loaded)[0].capacity == 2.0
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    with pytest.raises(UserError, match="already"):
        upcycle(loaded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_balance_losses_are_named_parts_and_even_the_load(tmp_path, checkpointing):
    settings = TrainSettings(steps=12, batch_size=6, learning_rate=5e-3, activation_checkpointing=checkpointing)
    model = llama(num_hidden_layers=2)
    upcycle(model, experts=4, every=1)
    with torch.no_grad():
        for network in networks(model):
            network.gate.weight.normal_(std=0.3)
    method = compose(model, METHODS["finetune_full"](model, settings=settings), [("balance", {"load_balance": 10.0})], collator=None)
    data = samples("t", 12)
    inputs = collate(data)
    before = balance(model, inputs)
    trainer = Trainer(model, method, collate, settings=settings, folder=tmp_path)
    list(trainer.learn(Stream(tasks=(Task(name="t", train=data, test=[]),))))
    rows = read_jsonl(tmp_path / "losses.jsonl")
    assert set(rows[0]["parts"]) == {"next_token", "load_balance", "router_z"}
    assert balance(model, inputs) - 1 < 0.5 * (before - 1)  # without the addition the load gets less even: 1.15 to 1.66
    assert not any(network.gate._forward_hooks for network in networks(model))


def test_balance_losses_leave_padding_out_and_see_the_forward_that_is_learnt_from():
    model, processor = build("llava")
    upcycle(model, experts=4)
    settings = TrainSettings(steps=1)
    collator = Collator(processor)
    method = compose(model, METHODS["finetune_full"](model, settings=settings), [("balance", {})], collator=collator)
    task = Task(name="t", train=pictures("t", 2), test=[])
    method.begin_task(model, task)
    method.begin_stage(model, task, method.stages(task)[0])
    batch = collator([pictures("a", 1)[0], *pictures("a much longer question", 1)])
    log = ScoreLog(model)
    logits = method.logits(model, batch)
    found = list(log.take().values())
    with torch.no_grad():
        model(**{**batch, "labels": None})  # a teacher's, say
    parts = method.parts(model, batch, logits)
    valid = batch["attention_mask"].bool()
    assert not valid.all() and len(found) == 2
    torch.testing.assert_close(parts["load_balance"], 0.01 * sum(load_balance_loss(each, valid) for each in found) / 2)
    torch.testing.assert_close(parts["router_z"], 0.001 * sum(router_z_loss(each, valid) for each in found) / 2)
    log.close()
    method.end_task(model, task)


def test_padding_of_packed_rows_does_not_count():
    collator = Collator(build("llava")[1])
    asked = [Sample.ask(text, "red", id=text) for text in ("how many?", "what colour is the square?", "is the star left?")]
    lengths = [collator([sample])["input_ids"].shape[1] for sample in asked]
    batch = PackingCollator(collator, form="mask", max_length=sum(lengths) - 1)(asked)  # two rows, of which one is padded
    scores = torch.randn(*batch["input_ids"].shape, 4)
    valid = valid_tokens(batch["attention_mask"], scores)
    assert valid.sum() == sum(lengths) < valid.numel()
    assert [sorted(row, reverse=True) for row in valid.tolist()] == valid.tolist()
    other = torch.where(valid[..., None], scores, torch.randn_like(scores))
    assert torch.equal(load_balance_loss(scores, valid), load_balance_loss(other, valid))


def test_statistics_say_who_got_how_much_and_what_was_dropped():
    model = llama()
    upcycle(model, experts=4, capacity=1.0)
    with torch.no_grad():
        networks(model)[0].gate.weight.zero_()  # all tokens choose experts 0 and 1
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 8:] = 0
    first = routing_statistics(model, {"input_ids": tokens(), "attention_mask": mask})["model.layers.1.mlp"]
    assert first["load"] == [0.5, 0.5, 0, 0] and first["dropped"] == 0 and first["confidence"] == pytest.approx(0.5)
    first = routing_statistics(model.train(), {"input_ids": tokens(), "attention_mask": mask})["model.layers.1.mlp"]
    assert first["dropped"] == pytest.approx(1 - 3 * 2 * int(11 / 4) / (2 * 30))


BRIEF = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
OTHERS = {  # experts that add the residual themselves, and layers that write into what a network gave
    "bloom": lambda: BloomForCausalLM(BloomConfig(**BRIEF)),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=40, d_model=16, n_heads=2, n_layers=2)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**BRIEF)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_unusual_calls_of_a_network_answer_and_train(name):
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    with torch.no_grad():
        dense = model(input_ids=tokens()).logits
        (path,) = upcycle(model, experts=3)
        assert torch.equal(model(input_ids=tokens()).logits, dense)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.get_submodule(path).experts[2].parameters())


def test_a_row_without_tokens_is_no_fault():
    model = llama(num_hidden_layers=2)
    upcycle(model)
    assert networks(model)[0](torch.zeros(1, 0, 16)).shape == (1, 0, 16)


def test_what_cannot_be_upcycled_is_refused():
    wrong = ({"experts": 0}, {"top_k": 9}, {"every": 0}, {"capacity": 0.0}, {"experts": "4"}, {"every": 1.5}, {"capacity": float("nan")})
    for options in wrong:
        with pytest.raises(UserError, match="Correct them"):
            upcycle(llama(), **options)
    with pytest.raises(UserError, match="Did you mean 'copy'"):
        upcycle(llama(), init="copies")
    with pytest.raises(UserError, match="no feed-forward network"):
        upcycle(llama(), every=9)
    twice = llama()
    upcycle(twice, every=3)
    with pytest.raises(UserError, match="already"):
        upcycle(twice, every=2)  # layers 1 and 3, of which none is sparse
    settings = TrainSettings(steps=1)
    with pytest.raises(UserError, match="no sparse feed-forward"):
        model = llama()
        compose(model, METHODS["finetune_full"](model, settings=settings), [("balance", {})], collator=None)
