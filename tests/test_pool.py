"""A pool on disk: adding changes nothing that is there, PEFT reads it, PEFT's adapters join, another base is refused."""

import json

import pytest
import torch

from alula.context import Routing
from alula.errors import UserError
from alula.files import sha256
from alula.mixture import attach, observe
from alula.peft_format import read_adapter
from alula.pool import Pool
from pool_of_one import logits, make_pool, teach, with_expert
from zoo import build, example_batch


def test_a_loaded_pool_gives_the_same_logits_for_every_router(tmp_path):
    model, processor, mixtures, _ = make_pool(tmp_path / "pool")
    batch = example_batch("llava", processor)
    fresh, _ = build("llava")
    loaded = Pool.open(tmp_path / "pool").attach(fresh)
    for routing in (
        Routing(router="analytic"),
        Routing(router="gate", level="token", top_k=2),
        Routing(router="arrow", level="token"),
        Routing(fixed={"invoices": 0.5}),
    ):
        with mixtures.using(routing), loaded.using(routing):
            assert torch.equal(logits(fresh, batch), logits(model, batch))


def test_an_expression_for_linears_is_kept_as_the_names_it_found(tmp_path):
    model, _ = build("llava")
    mixtures = attach(model, linears="[qv]_.*", layers=[0])
    pool = Pool.create(tmp_path / "pool", mixtures, base="tiny", linears="[qv]_.*", layers=[0])
    assert pool.manifest["linears"] == ["q_proj", "v_proj"]
    mixtures.detach()
    assert pool.attach(model).sites.keys() == {f"model.language_model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")}


def test_adding_an_expert_leaves_every_stored_file_as_it_was(tmp_path):
    folder = tmp_path / "pool"
    _, processor, mixtures, pool = make_pool(folder)
    before = {path: sha256(path) for path in folder.rglob("*.safetensors")}
    teach(mixtures, "receipts", seed=2)
    observe(mixtures, "receipts", example_batch("llava", processor))
    pool.add(mixtures, "receipts", about={})
    assert before == {path: sha256(path) for path in before}
    assert Pool.open(folder).names == ["invoices", "receipts"]


def test_peft_gives_the_specialists_logits(tmp_path):
    peft = pytest.importorskip("peft")
    model, processor, mixtures, pool = make_pool(tmp_path / "pool")
    batch = example_batch("llava", processor)
    mixtures.routing = Routing(fixed={"invoices": 1.0})
    ours = logits(model, batch)
    fresh, _ = build("llava")
    theirs = peft.PeftModel.from_pretrained(fresh, pool.expert_folder("invoices")).eval()
    torch.testing.assert_close(logits(theirs, batch), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_made_by_peft_joins_a_pool(tmp_path, rslora):
    peft = pytest.importorskip("peft")
    fresh, processor = build("llava")
    batch = example_batch("llava", processor)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False
    )
    made = peft.get_peft_model(fresh, config).eval()
    theirs = logits(made, batch)
    made.save_pretrained(tmp_path / "adapter")
    model, _, mixtures = with_expert()
    read_adapter(mixtures, "foreign", tmp_path / "adapter")
    mixtures.routing = Routing(fixed={"foreign": 1.0})
    torch.testing.assert_close(logits(model, batch), theirs, rtol=1e-5, atol=1e-5)
    mixtures.routing = Routing(router="arrow", level="token", top_k=2)
    assert logits(model, batch).isfinite().all()


def test_a_pool_of_another_base_model_is_refused(tmp_path):
    make_pool(tmp_path / "pool")
    other, _ = build("llava", seed=5)
    with pytest.raises(UserError, match=r"made for base model 'tiny'.*start a new pool"):
        Pool.open(tmp_path / "pool").attach(other)


def test_a_damaged_expert_is_named(tmp_path):
    folder = tmp_path / "pool"
    make_pool(folder)
    path = folder / "experts" / "invoices" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing or not what was saved"):
        Pool.open(folder).attach(build("llava")[0])


def test_a_full_disk_while_adding_leaves_the_pool_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "pool"
    _, _, mixtures, pool = make_pool(folder)
    before = (folder / "pool.json").read_bytes()
    teach(mixtures, "receipts", seed=2)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        pool.add(mixtures, "receipts", about={})
    assert (folder / "pool.json").read_bytes() == before
    assert not list(folder.rglob("*.part"))
    assert pool.names == ["invoices"]


def test_names_are_taken_once(tmp_path):
    _, _, mixtures, pool = make_pool(tmp_path / "pool")
    with pytest.raises(UserError, match="already"):
        pool.add(mixtures, "invoices", about={})
    with pytest.raises(UserError, match="already"):
        mixtures.grow("invoices")
    with pytest.raises(UserError, match="cannot name"):
        mixtures.grow("a/b")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"peft_type": "IA3"}, "LORA is accepted"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias")],
)
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, change, says):
    _, _, mixtures, pool = make_pool(tmp_path / "pool")
    path = pool.expert_folder("invoices") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        read_adapter(mixtures, "other", pool.expert_folder("invoices"))
