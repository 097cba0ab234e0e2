"""AIM: the mask and the loss are the published ones, prefixes are uniform, and a resumed run draws the same."""

from collections import Counter

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from alula.cli.app import app
from alula.data.image_collate import PrefixCollator
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.files import read_json, read_jsonl, read_tensors
from alula.models.encoders import VitEncoder
from alula.models.patch_predictor import PatchPredictor
from alula.objectives.aim import aim_loss, patches_of, prefix_causal_mask
from alula.running.pretrain import pretrain
from alula.running.pretrain_recipe import read_pretraining
from alula.training import TrainSettings

TINY = {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 12, "num_layers": 2}


def published_mask(n, k):
    i = torch.arange(n)
    return (i[None] < k) | (i[None] <= i[:, None])


def published_loss(pred, patches, k):
    t = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    w = (torch.arange(1, t.shape[1])[None] >= k[:, None]).float()
    return ((pred[:, :-1] - t[:, 1:]).square().mean(-1) * w).sum() / w.sum()


def test_the_mask_is_that_of_its_definition():
    prefix = torch.tensor([1, 4, 8])
    assert torch.equal(prefix_causal_mask(9, prefix), torch.stack([published_mask(9, k) for k in prefix]))


def test_the_loss_is_that_of_its_definition():
    predictions, patches = torch.randn(2, 3, 9, 12)
    prefix = torch.tensor([1, 4, 8])
    torch.testing.assert_close(aim_loss(predictions, patches, prefix), published_loss(predictions, patches, prefix))


def test_a_perfect_prediction_costs_nothing():
    patches = torch.randn(2, 9, 12)
    deviation, mean = torch.std_mean(patches, -1, keepdim=True)  # unbiased
    predictions = ((patches - mean) / (deviation**2 + 1e-6).sqrt()).roll(-1, dims=1)
    assert aim_loss(predictions, patches, torch.tensor([1, 5])) < 1e-10
    assert aim_loss(predictions + 0.1, patches, torch.tensor([1, 5])).item() == pytest.approx(0.01, rel=1e-3)


def test_targets_inside_of_the_prefix_carry_no_loss():
    patches = torch.randn(2, 9, 12)
    predictions = torch.randn(2, 9, 12, requires_grad=True)
    aim_loss(predictions, patches, torch.tensor([2, 6])).backward()
    touched = predictions.grad.abs().sum(-1) > 0
    # prediction i is of patch i + 1: the first target is patch k, the last prediction is of nothing
    assert touched.tolist() == [[index in range(1, 8) for index in range(9)], [index in range(5, 8) for index in range(9)]]


@torch.no_grad()
def test_a_patch_that_may_not_be_read_never_changes_a_prediction():
    model = PatchPredictor(VitEncoder(image_size=32, patch_size=8, dim=12, num_layers=2), head_dim=8, num_blocks=2).eval()
    prefix = torch.tensor([3, 7])
    mask = prefix_causal_mask(16, prefix)
    pixels = torch.randn(2, 3, 32, 32)
    before = model(pixels, mask=mask)
    for patch in range(16):
        changed = pixels.clone()
        row, column = divmod(patch, 4)
        changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1.0
        is_changed = ~(model(changed, mask=mask) == before).all(-1)
        for image, k in enumerate(prefix.tolist()):
            expected = [patch < max(k, query + 1) for query in range(16)]
            assert is_changed[image].tolist() == expected, (image, patch)


def test_patches_are_cut_in_reading_order():
    pixels = torch.arange(4 * 6.0).view(1, 1, 4, 6).repeat(1, 3, 1, 1)
    patches = patches_of(pixels, (2, 2))
    assert patches.shape == (1, 4, 3 * 2 * 3)
    assert patches[0, 1, :6].tolist() == [3, 4, 5, 9, 10, 11]
    assert patches[0, 2, 0] == 12


def samples(count=8):
    return [Sample.ask("?", "red", images=(Image.new("RGB", (20, 16), (index, 0, 0)),), id=str(index)) for index in range(count)]


def plain(images):
    return torch.zeros(len(images), 3, 16, 16)


def test_prefixes_are_uniform_and_labels_are_the_targets_outside_of_them():
    collate = PrefixCollator(plain, num_patches=5, seed=3)
    counts = Counter()
    for number in range(100):
        batch = collate(samples(8)[number % 8 :] + samples(number % 8 + number))
        counts.update(batch["prefix"].tolist())
        assert torch.equal((batch["labels"][:, 1:] == 0).sum(1), 5 - batch["prefix"])
    assert set(counts) == {1, 2, 3, 4}
    expected = counts.total() / 4
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_what_is_drawn_follows_from_the_batch_and_the_seed():
    found = [PrefixCollator(plain, num_patches=64, seed=seed)(samples())["prefix"].tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert PrefixCollator(plain, num_patches=64)(samples()[::-1])["prefix"].tolist()[::-1] != found[0]


def test_another_company_gives_a_sample_another_crop_and_prefix_and_none_always_the_same():
    collate = PrefixCollator(plain, num_patches=1000)
    first, *others = samples()
    assert len({collate([first, other])["prefix"][0].item() for other in others}) > 1
    assert len({collate([first])["prefix"].item() for _ in range(5)}) == 1


def test_three_steps_train_the_encoder_and_count_the_targets(tmp_path):
    found = load_task("animals", train_size=12, test_size=0)
    task = Task(name="pairs", train=found.train, test=[])
    settings = TrainSettings(steps=3, batch_size=6, micro_batch_size=3, learning_rate=1e-2)
    made = pretrain("aim", task, encoder=TINY, settings=settings, folder=tmp_path, options={"head_dim": 8, "num_blocks": 1})
    rows = read_jsonl(tmp_path / "losses.jsonl")
    assert rows[2]["loss"] < rows[0]["loss"]
    assert all(6 <= row["targets"] <= 6 * 15 for row in rows) and len({row["targets"] for row in rows}) > 1
    about = read_json(made.with_suffix(".json"))
    assert about["retrieval"] is None and about["probes"] == {} and about["seconds"] > 0
    again = pretrain("aim", task, encoder=TINY, settings=settings, folder=tmp_path, options={"head_dim": 8, "num_blocks": 1})
    assert read_json(again.with_suffix(".json")) == about  # the same command changes nothing, its time included
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        fresh = VitEncoder(**{key: value for key, value in TINY.items() if key != "name"}).state_dict()
    kept = read_tensors(made)
    assert kept.keys() == fresh.keys()
    assert not torch.equal(kept["model.embeddings.patch_embedding.weight"], fresh["model.embeddings.patch_embedding.weight"])


def test_an_encoder_without_a_mask_and_an_unknown_objective_are_refused(tmp_path):
    task = Task(name="pairs", train=samples(), test=[])
    with pytest.raises(UserError, match="which patches it may read"):
        pretrain("aim", task, encoder={"name": "patch", "image_size": 32}, settings=TrainSettings(steps=1), folder=tmp_path)
    with pytest.raises(UserError, match="Known: clip, aim"):
        pretrain("mae", task, encoder=TINY, settings=TrainSettings(steps=1), folder=tmp_path)


def test_the_command_line_trains_on_the_built_in_images(tmp_path):
    words = ["pretrain", "aim", "--out", tmp_path, "--train-size", 8, "--probe-size", 8, "--part", "dim=8", "--part", "num_layers=1"]
    result = CliRunner().invoke(app, [*map(str, words), "--head", "head_dim=8", "--set", "steps=1", "--set", "batch_size=4"])
    assert result.exit_code == 0, result.output
    about = read_json(tmp_path / "encoder.json")
    assert (about["encoder"]["dim"], about["encoder"]["image_size"], about["train_samples"]) == (8, 64, 32)
    assert f"{about['probes']['animals']['after']['score']:.3f}" in result.output and "8 test images" in result.output
    near = about["probes"]["animals"]["after"]["neighbours"]
    assert near["num_queries"] == 8 and f"recall@1 {near['recall']['1']:.3f}" in result.output


@pytest.mark.parametrize("objective", ["clip", "aim"])
def test_the_recipes_of_pretraining_say_what_the_objectives_do_by_default(objective):
    assert read_pretraining(f"recipes/pretraining/{objective}.yaml", {}) == read_pretraining(objective, {})


def test_what_is_typed_goes_over_a_recipe_of_pretraining(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("objective: aim\nencoder: {dim: 96}\ntask: animals\ntrain: {steps: 7}\n")
    recipe = read_pretraining(str(path), {"encoder": {"num_layers": 2}, "train": {"batch_size": 8}, "captions": 0.0})
    assert (recipe.encoder["dim"], recipe.encoder["num_layers"], recipe.encoder["image_size"]) == (96, 2, 64)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.weight_decay) == (7, 8, 0.05)
    assert recipe.task.name == "animals" and recipe.captions == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("objective: mae\n", "the objective is 'mae'. Known: clip, aim"),
        ("objective: clip\ncaption: 0.2\n", "unknown key 'caption'. .*captions"),
        ("objective: clip\nencoder: [vit]\n", "'encoder' is .* a mapping is wanted"),
        ("objective: clip\ntrain: {step: 4}\n", "unknown key 'step'. .*steps"),
    ],
)
def test_a_wrong_recipe_of_pretraining_is_told(text, says, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_pretraining(str(path), {})
