"""Adapters as a folder: what comes back is what was saved, and nothing that is half, foreign, damaged or absurd is read."""

import re
import shutil

import pytest
import torch

from alula import attach_adapters, load_adapters, save_adapters
from alula.errors import UserError
from alula.files import read_json, read_tensors, sha256, write_json, write_tensors
from alula.models import base_fingerprint
from methods_at_work import learn
from taught_adapters import SMALL, logits, teach
from zoo import build, example_batch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of taught adapters, a batch, what the model said to it with them, and what a fresh model says."""
    model, processor = build("llava")
    batch = example_batch("llava", processor)
    adapters = teach(attach_adapters(model, router="both", gumbel=True, layers=(0, -1), **SMALL))
    folder = save_adapters(adapters, tmp_path_factory.mktemp("made") / "adapters", base="tiny")
    model.requires_grad_(False)
    return folder, batch, logits(model, batch)


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made[0], tmp_path / "adapters")


@pytest.fixture(scope="module")
def fresh():
    """A model that tests load into in vain: it stays as it is."""
    return build("llava")[0].requires_grad_(False)


def change(folder, *keys, value):
    """Another value somewhere in the manifest."""
    manifest = read_json(folder / "adapters.json")
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    write_json(folder / "adapters.json", manifest)


def test_what_was_saved_comes_back_bit_for_bit_with_how_it_sits_in_the_model(made, fresh):
    folder, batch, said = made
    before = logits(fresh, batch)
    adapters = load_adapters(fresh, folder)
    fresh.requires_grad_(False)
    found = logits(fresh, batch)
    assert (adapters.config.router, adapters.config.layers, len(adapters.sites)) == ("both", (0, -1), 2)
    adapters.detach()
    assert torch.equal(found, said) and not torch.equal(found, before)
    assert torch.equal(logits(fresh, batch), before)


def test_what_was_trained_with_them_comes_back_and_leaves_with_them(tmp_path):
    model, method, _ = learn("mome", "one", **SMALL)
    base, processor = build("llava")
    batch = example_batch("llava", processor)
    trained = method.trained_with(model)
    assert trained and all("projector" in name for name in trained)
    with pytest.raises(UserError, match="trained came without fingerprint"):
        save_adapters(method.adapters, tmp_path / "a", base="tiny", trained=trained)
    save_adapters(method.adapters, tmp_path / "a", base="tiny", trained=trained, fingerprint=base_fingerprint(base))
    before = logits(base.requires_grad_(False), batch)
    adapters = load_adapters(base, tmp_path / "a")
    base.requires_grad_(False)
    assert torch.equal(logits(base, batch), logits(model.eval(), batch))
    assert torch.equal(logits(adapters.detach(), batch), before)


@pytest.mark.parametrize("missing", ["adapters.json", "adapters.safetensors"])
def test_a_half_written_folder_is_refused(folder, fresh, missing):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=missing):
        load_adapters(fresh, folder)


def test_a_saving_that_was_cut_short_is_no_adapter_and_may_be_done_again(made, tmp_path, monkeypatch, fresh):
    model, _ = build("llava")
    adapters = attach_adapters(model, **SMALL)

    def full(*_):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("alula.pool.adapter_folder.write_json", full)
        with pytest.raises(UserError, match="disk is full"):
            save_adapters(adapters, tmp_path / "a", base="tiny")
    with pytest.raises(UserError, match="which is written last, is missing"):
        load_adapters(fresh, tmp_path / "a")
    save_adapters(adapters, tmp_path / "a", base="tiny")
    load_adapters(fresh, tmp_path / "a").detach()
    with pytest.raises(UserError, match="holds adapters already"):
        save_adapters(adapters, tmp_path / "a", base="tiny")


def test_adapters_of_another_base_are_refused_and_leave_the_model_alone(folder):
    for other in (build("llava", seed=1)[0], build("qwen2_vl")[0]):
        names = [name for name, _ in other.named_modules()]
        with pytest.raises(UserError, match="were made for base model 'tiny'"):
            load_adapters(other, folder)
        assert [name for name, _ in other.named_modules()] == names


def test_a_file_that_changed_is_refused(folder, fresh):
    content = bytearray((folder / "adapters.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapters.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not what was saved"):
        load_adapters(fresh, folder)


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("config", "num_experts"), 4000, "adapters.4.down.weight' of shape none; adapters.json asks for ["),
        (("config", "num_experts"), 1, "asks for none"),
        (("config", "bottleneck"), 10**9, "asks for [1000000000, "),
        (("config", "hidden_dim"), 10**9, "asks for [1000000000]"),
        (("config", "layers"), [0], "asks for none"),
        (("config", "surprise"), 1, "config.surprise"),
        (("files", "../../etc/passwd"), "0" * 64, "No alula writes this"),
        (("files", "other.bin"), "0" * 64, "adapters.safetensors, other.bin"),
        (("files",), {}, "names the files"),
        (("format",), 2, "Install a newer alula"),
    ],
)
def test_a_manifest_that_no_alula_writes_is_refused_before_anything_is_allocated(folder, fresh, keys, value, says):
    names = [name for name, _ in fresh.named_modules()]
    change(folder, *keys, value=value)
    with pytest.raises(UserError, match=re.escape(says)):
        load_adapters(fresh, folder)
    assert [name for name, _ in fresh.named_modules()] == names


@pytest.mark.parametrize("end", ["down.weight", "up.weight", "scale", "mlp.0.weight", "mlp.2.weight", "mlp.2.bias"])
def test_no_tensor_of_another_shape_is_read_or_made_room_for(folder, fresh, monkeypatch, end):
    tensors, largest = read_tensors(folder / "adapters.safetensors"), 10**9
    tensors |= {name: torch.zeros(largest, 0) for name in tensors if name.endswith(end)}  # of no byte in the file
    write_tensors(folder / "adapters.safetensors", tensors)
    change(folder, "files", "adapters.safetensors", value=sha256(folder / "adapters.safetensors"))
    for key in {"down.weight": ("bottleneck",), "mlp.0.weight": ("hidden_dim",)}.get(end, ()):
        change(folder, "config", key, value=largest)
    monkeypatch.setattr("alula.pool.adapter_folder.read_tensors", lambda path: pytest.fail("read"))
    with pytest.raises(UserError, match=r"holds '\S+' of shape .*; adapters.json asks for .* in this model. Load the base model"):
        load_adapters(fresh, folder)
    assert not any("adapters" in name for name, _ in fresh.named_modules())


def test_trained_values_that_do_not_fit_and_links_to_elsewhere_are_refused(folder, fresh, tmp_path):
    write_tensors(folder / "trained.safetensors", {"model.nowhere": torch.zeros(2)})
    change(folder, "files", "trained.safetensors", value=sha256(folder / "trained.safetensors"))
    with pytest.raises(UserError, match=r"'model.nowhere' of shape \(2,\), the model has none"):
        load_adapters(fresh, folder)
    (folder / "trained.safetensors").rename(tmp_path / "elsewhere")
    (folder / "trained.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        load_adapters(fresh, folder)
    assert not any("adapters" in name for name, _ in fresh.named_modules())
