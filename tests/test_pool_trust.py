"""Pools that were copied half-way, renamed, or made by somebody who means harm."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alula.context import Routing
from alula.errors import UserError
from alula.files import read_json, sha256, write_json, write_jsonl
from alula.learners import attach_learners
from alula.pool import Pool
from alula.pool.manifest import read_manifest
from alula.pool.renaming import guess
from alula.report.pool_page import build_pool_report
from pool_of_one import folder, logits, made, teach
from zoo import build, example_batch

__all__ = ["folder", "made"]


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


X = {"name": "x", "files": dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), "0" * 64)}
LIES = {
    "a name that leads out": ({"experts": [{**X, "name": "../../x"}]}, r"'experts\.0\.name' is '\.\./\.\./x'"),
    "a file that leads out": ({"experts": [{**X, "files": {"../y": "0" * 64}}]}, r"experts\.0\.files"),
    "a name with markup": ({"experts": [{**X, "name": "<script>"}]}, "<script>"),
    "the same name twice": ({"experts": [X, X]}, "x comes twice"),
    "another base": ({"experts": [{**X, "base": "1" * 64}]}, "x was trained on another base model"),
    "an expert nobody can check": ({"experts": [{"name": "invoices", "files": {}}]}, "does not name experts/invoices/adapter_config"),
    "learners nobody can check": ({"learners": [{"name": "x", "files": {}}]}, "does not name learners/x/learners.json"),
    "an unknown key": ({"loader": "os.system"}, "'loader'"),
    "a score of text": ({"experts": [{**X, "about": {"before": "<b>"}}]}, r"about\.before"),
    "an unknown router": ({"arm": "analitic"}, "Did you mean 'analytic'"),
    "a terminal's orders": ({"base": {"name": "a\x1b[2J", "fingerprint": "0" * 64}}, r"base\.name"),
    "a newer format": ({"format": 2}, "Install a newer alula"),
    "layers of text": ({"layers": ["0"]}, "layers"),
    "an expression that takes for ever": ({"linears": "(a+)+$"}, r"'linears' is '\(a\+\)\+\$': Input should be a valid list"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_with_what_no_alula_writes_is_refused(lie, folder):
    entries, says = LIES[lie]
    change(folder, **entries)
    with pytest.raises(UserError, match=says):
        Pool.open(folder)


def test_absurd_json_is_refused_unread(folder):
    (folder / "pool.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_manifest(folder)
    os.truncate(folder / "pool.json", 2**40)  # a hole: the disk holds nothing of it
    with pytest.raises(UserError, match="no file of up to 67,108,864 bytes"):
        read_manifest(folder)
    (folder / "pool.json").unlink()
    os.mkfifo(folder / "pool.json")  # who reads it waits for ever
    with pytest.raises(UserError, match="no file of up to"):
        read_manifest(folder)


def test_absurd_json_in_an_expert_or_its_predictions_is_refused_and_the_model_is_as_it_was(folder, fresh):
    deep, digits = "[" * 200_000, f'{{"r": {"1" * 5000}}}'
    for content, says in ((deep, "nested too deeply"), (digits, "4300 digits")):
        (folder / "experts" / "invoices" / "adapter_config.json").write_text(content)
        vouch(folder)
        with pytest.raises(UserError, match=f"adapter_config.json:1: not valid JSON .*{says}"):
            Pool.open(folder).attach(fresh)
        (folder / "experts" / "invoices" / "predictions.jsonl").write_text(f"{{}}\n{content}\n")
        with pytest.raises(UserError, match=f"predictions.jsonl:2: not valid JSON .*{says}"):
            build_pool_report(folder)
    assert is_bare(fresh)


def is_bare(model):
    return not any(type(module).__module__.startswith("alula") for module in model.modules())


def test_whatever_goes_wrong_while_a_pool_is_attached_the_model_is_as_it_was(folder, fresh, monkeypatch):
    def fail(folder):
        raise MemoryError

    monkeypatch.setattr("alula.pool.expert_files.read_pairs", fail)
    with pytest.raises(MemoryError):
        Pool.open(folder).attach(fresh)
    assert is_bare(fresh)


@pytest.mark.parametrize("lie", ["rank", "width", "config", "pair", "type"])
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
    elif lie == "type":
        tensors[key] = torch.zeros(2, width, dtype=torch.int64)
    save_file(tensors, expert / "adapter_model.safetensors")
    if lie == "config":
        write_json(expert / "adapter_config.json", {**read_json(expert / "adapter_config.json"), "r": 64})
    elif lie != "type":
        monkeypatch.setattr("alula.peft_format.map_tensors", lambda path: pytest.fail("read"))
    vouch(folder)
    says = {"rank": "has rank 5,000 in a layer", "width": "made for another base model", "config": "rank 64", "pair": "do not multiply"}
    with pytest.raises(UserError, match=says.get(lie, "is torch.int64; floating point is accepted")):
        Pool.open(folder).attach(fresh)
    assert is_bare(fresh)


def test_a_router_file_larger_than_the_model_is_refused_unread(folder, fresh):
    os.truncate(folder / "experts" / "invoices" / "router.safetensors", 2**33)
    with pytest.raises(UserError, match="8,589,934,592 bytes; 1,073,741,824 are the most"):
        Pool.open(folder).attach(fresh)


def with_learners(folder, config, tensors):
    home = folder / "learners" / "birds"
    home.mkdir(parents=True)
    (home / "learners.json").write_text(config)
    save_file(tensors, home / "learners.safetensors")
    files = {file: sha256(home / file) for file in ("learners.json", "learners.safetensors")}
    change(folder, learners=[{"name": "birds", "files": files}])
    return home


@pytest.mark.parametrize("asked", [{"rank": 10**9}, {"rank": "65536"}, {"rank": 1e9}, {"rank": 4, "positions": 65536}, {"rank": 2}])
def test_learners_that_ask_for_other_sizes_than_their_file_has_are_refused_unallocated(asked, folder, fresh, monkeypatch):
    learners = attach_learners(fresh, rank=4, positions=8)
    tensors = {name: tensor.clone() for name, tensor in learners.tensors().items()}
    learners.detach()
    with_learners(folder, json.dumps({"rank": 4, "positions": 8, **asked}), tensors)
    allocated = []

    def attaching(model, *, config):
        allocated.append((config.rank, config.positions))
        return attach_learners(model, config=config)

    monkeypatch.setattr("alula.learner_format.attach_learners", attaching)
    with pytest.raises(UserError, match=r"holds 'layers\.\S+' of shape .*; learners.json asks for"):
        Pool.open(folder).attach_learners(fresh)
    assert allocated == [(1, 1)]
    assert is_bare(fresh)


@pytest.mark.parametrize(("config", "says"), [("[1]", "the file: "), ('{"rnk": 4}', "rnk: "), ("[" * 200_000, "nested too deeply")])
def test_a_configuration_of_learners_that_is_none_is_refused(config, says, folder, fresh):
    with_learners(folder, config, {"a": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=f"learners.json:.*{says}"):
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
