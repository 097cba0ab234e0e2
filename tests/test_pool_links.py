"""A pool from elsewhere leads nowhere: links are refused, files that are not named are not read, and routers fit or are refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alula.context import Routing
from alula.errors import UserError
from alula.files import read_json, sha256, write_json
from alula.learner_format import read_learners, write_learners
from alula.learners import attach_learners
from alula.mixture import attach
from alula.pool import Pool
from alula.pool.lock import locked
from alula.report.card import write_card
from pool_of_one import folder, logits, made, teach
from zoo import build, example_batch

__all__ = ["folder", "made"]

FILES = (".lock", ".holder", "README.md", "pool.json", "experts/invoices/predictions.jsonl", "base/router.safetensors")
FOLDERS = ("evaluation", "learning/birds", "experts/invoices", "base")


@pytest.fixture(scope="module")
def fresh():
    """A model that tests attach to in vain, or detach from: it stays as it is."""
    return build("llava")[0]


@pytest.mark.parametrize("place", [*FILES, *FOLDERS])
def test_a_link_out_of_the_pool_is_refused_before_anything_is_read_or_written(made, place, folder, tmp_path):
    there, outside = folder / place, tmp_path / "outside"
    there.parent.mkdir(exist_ok=True)
    if there.exists():
        there.rename(outside)
    elif place in FOLDERS:
        outside.mkdir()
    else:
        outside.write_text("precious")
    there.symlink_to(outside)
    before = {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()}

    def change_it():
        with locked(folder, doing="learning 'birds'"):
            pytest.fail("changed")

    pool = Pool(folder, read_json(made[0] / "pool.json"))
    doors = (lambda: Pool.open(folder), change_it, lambda: write_card(folder), lambda: pool.push_to_hub("owner/name"))
    for door in doors:
        with pytest.raises(UserError, match="leads out of"):
            door()
    assert before == {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()}


def test_a_link_within_the_pool_is_replaced_and_not_written_through(folder):
    before = (folder / "pool.json").read_bytes()
    (folder / ".holder").symlink_to(folder / "pool.json")
    (folder / "circle").symlink_to(folder / "circle")
    with locked(folder, doing="learning 'birds'"):
        assert (folder / "pool.json").read_bytes() == before
        assert Pool.open(folder).names == ["invoices"]


def unname(folder, file):
    manifest = read_json(folder / "pool.json")
    for entry in (*manifest["experts"], manifest["base"]):
        entry["files"].pop(file, None)
    write_json(folder / "pool.json", manifest)


def test_a_file_that_the_manifest_does_not_name_is_not_read(folder, fresh):
    for router in folder.rglob("router.safetensors"):
        router.write_bytes(b"harm")
    with pytest.raises(UserError, match="not what was saved"):
        Pool.open(folder).attach(fresh)
    unname(folder, "router.safetensors")
    mixtures = Pool.open(folder).attach(fresh)
    try:
        assert not any(key.startswith("prompt.") for name in ("invoices", "base") for key in mixtures.router_tensors(name))
    finally:
        mixtures.detach()


def test_what_learners_were_not_trained_with_is_not_read(fresh, tmp_path):
    learners = attach_learners(fresh, rank=2, positions=8)
    files = write_learners(learners, tmp_path)
    learners.detach()
    (tmp_path / "trained.safetensors").write_bytes(b"left by a crash")
    read_learners(fresh, tmp_path, files=files).detach()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_learners(fresh, tmp_path, files=(*files, "trained.safetensors"))


def spoiled(tensors, lie):
    gate = next(key for key in tensors if key.startswith("gate."))
    return {
        "shape": {**tensors, gate: torch.zeros(1)},
        "sum": {**tensors, "prompt.kinds": torch.zeros(3)},
        "type": {key: tensor.to(torch.int64) for key, tensor in tensors.items()},
        "foreign": {key.replace("language_model", "text_model"): tensor for key, tensor in tensors.items()},
        "nonsense": {"nonsense": torch.zeros(1)},
        "missing": {key: tensor for key, tensor in tensors.items() if key != "prompt.kinds"},
    }[lie]


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ("shape", r"'gate\.model\S+' is torch.float32 of shape \(1,\)"),
        ("sum", r"'prompt.kinds' is torch.float32 of shape \(3,\); .* of shape \(2,\)"),
        ("type", r"'\S+' is torch.int64"),
        ("foreign", r"'gate\.model\.text_model\.\S+' belongs to none"),
        ("nonsense", "'nonsense' belongs to none"),
        ("missing", "'prompt.kinds' is missing"),
    ],
)
def test_routers_that_do_not_fit_the_model_are_refused_by_name(lie, says, folder, fresh):
    path = folder / "experts" / "invoices" / "router.safetensors"
    save_file(spoiled(load_file(path), lie), path)
    manifest = read_json(folder / "pool.json")
    manifest["experts"][0]["files"]["router.safetensors"] = sha256(path)
    write_json(folder / "pool.json", manifest)
    with pytest.raises(UserError, match=rf"invoices/router.safetensors: {says}"):
        Pool.open(folder).attach(fresh)
    assert not any(type(module).__module__.startswith("alula") for module in fresh.modules())


def test_routers_that_were_left_out_take_nothing_back(made):
    _, live, processor, mixtures, _ = made
    model = build("llava")[0]
    gates_alone = attach(model, routers=("gate",))
    teach(gates_alone, "invoices", seed=1)
    for name in ("invoices", "base"):
        gates_alone.restore_router(name, {"dense.x.gate": torch.zeros(1), **mixtures.router_tensors(name)})
    batch, routing = example_batch("llava", processor), Routing(router="gate", level="token", top_k=1)
    with gates_alone.using(routing), mixtures.using(routing):
        assert torch.equal(logits(model, batch), logits(live, batch))
