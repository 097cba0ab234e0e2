"""Pools that were copied half-way, renamed, or made by somebody who means harm."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alula.context import Routing
from alula.errors import UserError
from alula.files import read_json, sha256, write_json, write_jsonl
from alula.pool import Pool
from alula.pool.manifest import read_manifest
from alula.pool.renaming import guess
from alula.report.pool_page import build_pool_report
from test_pool import logits, make_pool, teach
from zoo import build, example_batch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool with one expert and the live model that carries it."""
    folder = tmp_path_factory.mktemp("made") / "pool"
    return folder, *make_pool(folder)


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may spoil."""
    copy = tmp_path / "pool"
    subprocess.run(["cp", "-r", made[0], copy], check=True)
    return copy


@pytest.fixture(scope="module")
def fresh():
    """A model that tests attach to in vain, or detach from: it stays as it is."""
    return build("llava")[0]


def change(folder, **entries):
    manifest = read_json(folder / "pool.json")
    write_json(folder / "pool.json", {**manifest, **entries})


def change_expert(folder, **entries):
    (expert,) = read_json(folder / "pool.json")["experts"]
    change(folder, experts=[{**expert, **entries}])


def vouch(folder):
    """Gives the manifest the digests of the files as they are: what a malicious maker would do."""
    (expert,) = read_json(folder / "pool.json")["experts"]
    change_expert(folder, files={file: sha256(folder / "experts" / "invoices" / file) for file in expert["files"]})


def test_a_pool_that_was_copied_half_way_is_refused_with_what_is_missing(folder):
    (folder / "experts" / "invoices" / "router.safetensors").unlink()
    (folder / "base" / "router.safetensors").unlink()
    with pytest.raises(UserError, match=r"2 of the 4 files .* missing: base/router.safetensors, experts/invoices/router.safetensors"):
        Pool.open(folder)


def renamed_model(model):
    """The same weights in a class whose text model has another name, as transformers 4.52 and 5 did to many."""

    class Renamed(type(model.model)):
        """Its forward asks for `language_model`, which is not a module's name any more."""

        @property
        def language_model(self):
            return self._modules["text_model"]

    Renamed.__name__ = type(model.model).__name__
    inner = model.model
    inner._modules = {("text_model" if name == "language_model" else name): module for name, module in inner._modules.items()}
    inner.__class__ = Renamed
    return model


def test_experts_whose_modules_were_renamed_are_refused_with_the_list_and_remapped_give_equal_logits(made, folder):
    _, live, processor, mixtures, _ = made
    batch = example_batch("llava", processor)
    with mixtures.using(Routing(router="gate", level="token", top_k=1)):
        wanted = logits(live, batch)
    model = renamed_model(build("llava")[0])
    pool = Pool.open(folder)
    with pytest.raises(
        UserError, match=r"28 layers that this model does not have: model\.language_model\.layers\.0\.\S+, .* and 22 more"
    ) as error:
        pool.attach(model)
    assert not any(type(module).__module__.startswith("alula") for module in model.modules())
    rule = re.search(r"alula remap \S+ (\S+)=(\S+)", str(error.value))
    with pytest.raises(UserError, match="By these rules"):
        pool.remap(model, {"model.language_model": "model.words"})
    pool.remap(model, {rule[1]: rule[2]})
    loaded = Pool.open(folder).attach(model)
    with loaded.using(Routing(router="gate", level="token", top_k=1)):
        assert torch.equal(logits(model, batch), wanted)
    teach(loaded, "new", seed=4)  # an expert learnt under the new names needs no rule
    pool.add(loaded, "new", about={})
    loaded.detach()
    assert pool.attach(model).names == ["invoices", "new"]
    keys = load_file(pool.export("invoices", folder.parent / "out") / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.text_model.") for key in keys)


def test_a_rename_is_guessed_only_where_one_rule_explains_all():
    old = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert guess(old, [path.replace("self_attn", "attention") for path in old]) == {"self_attn": "attention"}
    assert guess(old, [f"model.text.{path}" for path in old]) == {"model": "model.text.model"}
    assert guess(["a.x.q", "b.y.q"], ["c.x.q", "d.y.q"]) == {}


LIES = {
    "a name that leads out": ({"experts": [{"name": "../../x", "files": {}}]}, r"'experts\.0\.name' is '\.\./\.\./x'"),
    "a file that leads out": ({"experts": [{"name": "x", "files": {"../y": "0" * 64}}]}, r"experts\.0\.files"),
    "a name with markup": ({"experts": [{"name": "<script>", "files": {}}]}, "<script>"),
    "the same name twice": ({"experts": [{"name": "x", "files": {}}] * 2}, "x comes twice"),
    "another base": ({"experts": [{"name": "x", "files": {}, "base": "1" * 64}]}, "x was trained on another base model"),
    "an unknown key": ({"loader": "os.system"}, "'loader'"),
    "a score of text": ({"experts": [{"name": "x", "files": {}, "about": {"before": "<b>"}}]}, r"about\.before"),
    "an unknown router": ({"arm": "analitic"}, "Did you mean 'analytic'"),
    "a terminal's orders": ({"base": {"name": "a\x1b[2J", "fingerprint": "0" * 64}}, r"base\.name"),
    "a newer format": ({"format": 2}, "Install a newer alula"),
    "layers of text": ({"layers": ["0"]}, "layers"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_with_what_no_alula_writes_is_refused(lie, folder):
    entries, says = LIES[lie]
    change(folder, **entries)
    with pytest.raises(UserError, match=says):
        Pool.open(folder)


def test_absurd_json_is_refused_unread(folder):
    (folder / "pool.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"nested deeper|not valid JSON"):
        read_manifest(folder)
    os.truncate(folder / "pool.json", 2**40)  # a hole: the disk holds nothing of it
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        read_manifest(folder)


@pytest.mark.parametrize("file", ["experts/invoices/adapter_model.safetensors", "base/router.safetensors", "pool.json"])
def test_a_link_out_of_the_pool_is_refused(file, folder, tmp_path):
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        Pool.open(folder)


def test_adding_through_a_link_out_of_the_pool_is_refused(made, folder, tmp_path):
    _, _, _, mixtures, _ = made
    pool = Pool.open(folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "experts" / "copy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        pool.add(mixtures, "copy", about={})
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("lie", ["rank", "width", "config", "pair"])
def test_sizes_that_do_not_fit_the_model_are_refused_before_a_tensor_is_read(lie, folder, fresh, monkeypatch):
    expert = folder / "experts" / "invoices"
    tensors = load_file(expert / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    other, width = key.replace("lora_A", "lora_B"), tensors[key].shape[1]
    if lie == "rank":
        tensors |= {key: torch.zeros(5000, width), other: torch.zeros(len(tensors[other]), 5000)}
    elif lie == "width":
        tensors[key] = torch.zeros(2, width + 1)
    elif lie == "pair":
        tensors[key] = torch.zeros(3, width)
    save_file(tensors, expert / "adapter_model.safetensors")
    if lie == "config":
        write_json(expert / "adapter_config.json", {**read_json(expert / "adapter_config.json"), "r": 64})
    else:
        monkeypatch.setattr("alula.peft_format.map_tensors", lambda path: pytest.fail("read"))
    vouch(folder)
    says = {"rank": "has rank 5,000 in a layer", "width": "made for another base model", "config": "rank 64", "pair": "do not multiply"}
    with pytest.raises(UserError, match=says[lie]):
        Pool.open(folder).attach(fresh)
    assert not any(type(module).__module__.startswith("alula") for module in fresh.modules())


def test_a_router_file_larger_than_the_model_is_refused_unread(folder, fresh):
    os.truncate(folder / "experts" / "invoices" / "router.safetensors", 2**33)
    (expert,) = read_json(folder / "pool.json")["experts"]
    change_expert(folder, files={key: value for key, value in expert["files"].items() if "router" not in key})
    with pytest.raises(UserError, match="more than the base model itself"):
        Pool.open(folder).attach(fresh)


def test_learners_that_ask_for_more_than_their_file_holds_are_refused_unallocated(folder, fresh):
    home = folder / "learners" / "birds"
    home.mkdir(parents=True)
    write_json(home / "learners.json", {"rank": 10**9})
    save_file({"a": torch.zeros(2, 2)}, home / "learners.safetensors")
    files = {file: sha256(home / file) for file in ("learners.json", "learners.safetensors")}
    change(folder, learners=[{"name": "birds", "files": files}])
    with pytest.raises(UserError, match="asks for rank 1,000,000,000"):
        Pool.open(folder).attach_learners(fresh)


def test_the_report_shows_markup_of_a_pool_as_text(folder):
    bad = "<script>alert(1)</script>"
    row = {"id": "1", "task": bad, "prompt": bad, "reference": bad, "output": bad, "score": 1.0}
    write_jsonl(folder / "experts" / "invoices" / "before.jsonl", [row])
    write_jsonl(folder / "experts" / "invoices" / "predictions.jsonl", [row])
    write_jsonl(folder / "evaluation" / f"{bad.replace('/', '')}.jsonl", [row])
    base = read_json(folder / "pool.json")["base"]
    change(folder, base={**base, "name": bad})
    page = build_pool_report(folder).read_text()
    assert page.count("&lt;script&gt;alert(1)") >= 4
    assert "<script" not in page


def test_the_report_does_not_read_what_lies_outside_of_the_pool(folder, tmp_path):
    (tmp_path / "diary.jsonl").write_text(json.dumps({"id": "1", "score": 1.0, "prompt": "dear diary"}) + "\n")
    (folder / "experts" / "invoices" / "predictions.jsonl").symlink_to(tmp_path / "diary.jsonl")
    with pytest.raises(UserError, match="leads out of"):
        build_pool_report(folder)


def test_nothing_of_a_pool_is_read_as_pickle_or_as_yaml_that_makes_objects():
    source = Path(sys.modules["alula"].__file__).parent
    files = [
        *source.joinpath("pool").glob("*.py"),
        source / "peft_format.py",
        source / "learner_format.py",
        *source.joinpath("report").glob("*.py"),
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert not re.search(
        r"^\s*(import|from) (pickle|marshal|shelve)|torch\.load|yaml\.(load|unsafe_load|full_load)\(|\beval\(|\bexec\(", text, re.MULTILINE
    )
