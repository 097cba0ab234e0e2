"""A pool goes to the hub with a card that shows what was forgotten, and comes back from there."""

import shutil

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from alula.context import Routing
from alula.errors import UserError
from alula.files import read_json, write_json, write_jsonl
from alula.pool import Pool
from alula.report.card import YOURS, write_card
from leaving_pools import alula, refused, world, worlds
from pool_of_one import logits
from zoo import build

__all__ = ["world", "worlds"]


def head_of(card):
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_the_card_shows_what_was_forgotten_and_keeps_what_its_owner_wrote(world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "pool")
    rows = [{"id": str(i), "task": "t", "prompt": "?", "reference": "a", "output": "a"} for i in range(4)]
    for path, right in (("experts/invoices/predictions.jsonl", 3), ("evaluation/invoices.jsonl", 2)):
        write_jsonl(folder / path, [{**row, "score": float(i < right)} for i, row in enumerate(rows)])
    card = write_card(folder, license="mit")
    text = card.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| invoices"))
    assert [cell.strip() for cell in line.split("|")[3:9]] == ["25.0", "75.0", "50.0", "25.0", "4", "exact match"]
    assert "base_model" not in head_of(card)  # a folder of this machine is no name on the hub
    card.write_text(text.replace("license: mit", "license: mit\nlanguage: de") + "Made by us.\n")
    manifest = read_json(folder / "pool.json")
    manifest["base"]["name"] = "Qwen/Qwen2-VL-2B-Instruct"
    write_json(folder / "pool.json", manifest)
    alula("card", folder)
    head = head_of(card)
    assert (head["license"], head["language"], head["base_model"]) == ("mit", "de", ["Qwen/Qwen2-VL-2B-Instruct"])
    assert head["library_name"] == "alula" and {"lora", "continual-learning"} <= set(head["tags"])
    assert card.read_text().partition(YOURS)[2].strip() == "Made by us."


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's two calls that go up and the one that comes down, played by a folder: there is no network in tests."""

    def create_repo(self, repo_id, *, private, exist_ok):
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (tmp_path / "hub" / repo_id / "private").write_text(str(private))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "hub" / repo_id / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / file, tmp_path / "hub" / repo_id / file)

    def snapshot_download(repo_id, *, allow_patterns):
        source, snapshot = tmp_path / "hub" / repo_id, tmp_path / "cache" / "models--x" / "snapshots" / "abc"
        if not source.exists():
            raise LocalEntryNotFoundError("No network.")
        for number, file in enumerate(
            filter_repo_objects([str(p.relative_to(source)) for p in source.rglob("*")], allow_patterns=allow_patterns)
        ):
            blob = tmp_path / "cache" / "models--x" / "blobs" / str(number)
            blob.parent.mkdir(parents=True, exist_ok=True)
            if (source / file).is_file():
                shutil.copy(source / file, blob)
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / file).symlink_to(blob)
        return str(snapshot)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_pushed_pool_is_private_shows_its_card_and_opens_by_name_with_the_same_logits(world, hub, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "pool")
    (folder / "experts" / "half-done").mkdir()
    (folder / "experts" / "half-done" / "adapter_model.safetensors").write_text("unfinished")
    write_jsonl(folder / "experts" / "invoices" / "predictions.jsonl", [{"id": "1", "prompt": "secret", "score": 1.0}])
    (folder / "learning").mkdir()
    (folder / "learning" / "checkpoint").write_text("weights")
    assert alula("push", folder, "me/my-pool").stdout.strip() == "https://huggingface.co/me/my-pool"
    there = hub / "me" / "my-pool"
    assert (there / "private").read_text() == "True"
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} - {"private"}
    files = ("adapter_config.json", "adapter_model.safetensors", "router.safetensors")
    assert found == {"README.md", "pool.json", *(f"experts/{name}/{file}" for name in ("invoices", "receipts") for file in files)}
    assert "alula generate --pool me/my-pool" in (there / "README.md").read_text()
    model, _ = build("llava")
    pool = Pool.open("me/my-pool")
    pool.attach(model).routing = Routing(fixed={"receipts": 1.0})
    assert torch.equal(logits(model, world.batch), world.logits(receipts=1.0))
    with pytest.raises(UserError, match="hub's copy in the cache"):
        pool.add(world.mixtures, "third", about={})


def test_a_name_that_is_neither_here_nor_on_the_hub_is_told(hub):
    with pytest.raises(UserError, match=r"No pool in you/nothing .*No network.*check the name, the network"):
        Pool.open("you/nothing")


def test_without_a_network_up_and_down_are_told_in_a_sentence(world, tmp_path):
    assert "hf auth login" in refused("push", shutil.copytree(world.folder, tmp_path / "pool"), "me/my-pool")
    with pytest.raises(UserError, match=r"No pool in you/nothing .* the hub gave none of that name: .+ Check the path"):
        Pool.open("you/nothing")


def test_a_pool_without_a_card_is_not_pushed(world, hub):
    with pytest.raises(UserError, match=r"no README.md.*alula card"):
        world.pool.push_to_hub("me/my-pool")
