"""Claims about sparse feed-forward networks: gating is MM1's, copies change nothing, balance is taught, folders load."""

import pytest
import torch
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
from alula.experts.sparse_ffn import ScoreLog, SparseFFN, logged_scores
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
