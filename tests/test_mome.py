"""MoME's training as a method: its two stages, what trains in them, the balance loss, and who spoke on which task."""

import pytest
import torch
from transformers import LlamaConfig

from alula import Collator, Stream, Trainer
from alula.adapters.site import FIRST
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.errors import UserError
from alula.evaluation.expert_shares import expert_shares
from alula.evaluation.ranking import rank_options
from alula.files import read_jsonl
from alula.methods import METHODS
from alula.methods.base import plain_logits
from alula.models.composed import ComposedConfig, ComposedVLM
from methods_at_work import SETTINGS, begun, changed, learn, tasks
from resume_worker import pictures
from zoo import build

SMALL = {"bottleneck": 4, "hidden_dim": 8}
FOUR = SETTINGS.model_copy(update={"steps": 4})


def adapter(method, number):
    return {name: tensor for name, tensor in method.adapters.tensors().items() if f".adapters.{number}." in name}


def test_stage_one_trains_one_adapter_and_stage_two_starts_with_copies_of_it():
    model, method, task, batch = begun("mome", **SMALL)
    before = {name: tensor.clone() for name, tensor in method.adapters.tensors().items()}
    single, mixture = method.stages(task)
    assert (single.name, mixture.name, single.steps, mixture.steps) == ("single", "mixture", 1, 1)
    trains = {name for name, parameter in method.adapters.parameters().items() if parameter.requires_grad}
    assert trains and all(".adapters.0." in name for name in trains)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(2):
        plain = {**batch, "labels": batch["input_ids"]}
        sum(method.loss(model, plain).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in method.adapters.tensors().items() if not torch.equal(before[name], tensor)}
    assert moved and all(".adapters.0." in name for name in moved)
    model.eval().requires_grad_(False)
    with torch.no_grad(), method.adapters.using(FIRST):
        ended = plain_logits(model, batch)
    method.end_stage(model, task, single)
    with torch.no_grad():
        assert torch.equal(plain_logits(model, batch), ended)
    first = {name.replace(".adapters.0.", ".adapters.3."): tensor for name, tensor in adapter(method, 0).items()}
    assert all(torch.equal(tensor, first[name]) for name, tensor in adapter(method, 3).items())
    method.begin_stage(model, task, mixture)
    assert all(parameter.requires_grad for parameter in method.adapters.parameters().values())


def test_the_connector_trains_unless_frozen_and_nothing_else_of_the_base():
    model, method, _ = learn("mome", "one", **SMALL)
    parts = {method.adapters.anatomy.part_of(path) for path in changed(model) if ".adapters." not in path and ".router." not in path}
    moved = {path for path in changed(model) if ".mlp." not in path}
    assert moved and all("projector" in path for path in moved) and "connector" in parts
    model, method, _ = learn("mome", "one", connector=False, **SMALL)
    method.adapters.detach()
    assert changed(model) == set()


def two_encoders():
    """A tiny model whose encoders are weighed by the instruction, and its collator."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ComposedConfig(
        text_config=LlamaConfig(vocab_size=40, **sizes),
        encoder_config=[{"name": "vit", "image_size": size, "patch_size": 8, "dim": 24, "num_layers": 1} for size in (16, 32)],
        connector_config=[{"name": "average_pool", "num_tokens": 4}, {"name": "deformable", "num_tokens": 4, "num_layers": 1}],
        image_token_id=3,
        image_seq_length=4,
        mixing="router",
        router_config={"input_dim": 5, "hidden_dim": 8},
    )

    def collator(samples):
        ids = torch.randint(4, 40, (len(samples), 9))
        ids[:, 1:5] = 3
        labels = ids.clone()
        labels[:, :7] = -100
        pixels, sentences = torch.randn(len(samples), 3, 32, 32), torch.randn(len(samples), 5)
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "instruction_embedding": sentences}

    return ComposedVLM(config), collator


def test_both_halves_of_mome_train_together_and_the_encoders_stay():
    model, collator = two_encoders()
    method = METHODS["mome"](model, settings=SETTINGS, **SMALL)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    list(Trainer(model, method, collator, settings=SETTINGS, folder=None).learn(Stream(tasks=tasks("one"))))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    roots = {name.partition(".")[0] if "language_model" not in name else name.split(".mlp.")[1].partition(".")[0] for name in moved}
    assert roots == {"connector", "adapters", "router"}
    assert any(name.startswith("connector.router.") for name in moved)


def run(folder=None, **options):
    model, processor = build("llava")
    method = METHODS["mome"](model, settings=FOUR, **SMALL, **options)
    trainer = Trainer(model, method, Collator(processor), settings=FOUR, folder=folder)
    assert len(list(trainer.learn(Stream(tasks=tasks("one", "two"))))) == 2
    return model, processor, method


@pytest.mark.parametrize("router", ["instance", "token", "both"])
def test_every_variant_learns_in_two_stages_and_a_later_task_goes_on_with_the_second(tmp_path, router):
    _, _, method = run(tmp_path, router=router, gumbel=True, load_balance=0.01, connector_learning_rate=1e-4)
    rows = read_jsonl(tmp_path / "losses.jsonl")
    stages = [(row["task"], row["stage"]) for row in rows]
    assert stages == [("one", "single")] * 2 + [("one", "mixture")] * 2 + [("two", "mixture")] * 4
    balance = [row.get("parts", {}).get("load_balance") for row in rows]
    assert balance[:2] == [None, None] and all(0.01 * 0.9 < value < 0.01 * 4.001 for value in balance[2:])
    assert any(not torch.equal(a, b) for a, b in zip(adapter(method, 0).values(), adapter(method, 1).values(), strict=True))


def test_the_balance_loss_is_e_times_the_sum_of_shares_and_probabilities():
    model, method, _, _ = begun("mome", load_balance=0.5, single_ratio=0.0, **SMALL)
    batch = Collator(build("llava")[1])(pictures("one", 5))
    found, instruction = method.loss(model, batch)["load_balance"], method.adapters.instructions(batch)
    scores = [site.router.mlp(instruction) for site in method.adapters.sites.values()]
    expected = []
    for values in scores:
        p = values.softmax(-1)
        f = torch.stack([(p.argmax(-1) == k).float().mean() for k in range(4)])
        expected.append(4 * (f * p.mean(0)).sum())
    torch.testing.assert_close(found, 0.5 * torch.stack(expected).mean())


def test_ranked_answers_follow_the_question_alone():
    """Options of one question are rows of one batch; what they say must not choose their expert."""
    model, processor, method = run()
    sample = Sample.ask("What is it?", "red", options=("red", "a very long green thing"))
    seen = []
    with method.adapters.recording(lambda path, choice, valid: seen.append(choice.scores)):
        rank_options(model, Collator(processor), [sample], device=torch.device("cpu"), around=method.arms()[0].around)
    assert seen
    for scores in seen:
        torch.testing.assert_close(scores[0], scores[1])


def test_shares_count_who_was_chosen_for_each_task_and_block():
    model, processor, method = run()
    groups = (Task(name="colours", train=[], test=pictures("what colour is", 3)), Task(name="letters", train=[], test=pictures("q", 3)))
    found = expert_shares(method.adapters, model, Collator(processor), groups)
    assert (
        found["tasks"] == ["colours", "letters"]
        and found["layers"] == list(range(method.adapters.anatomy.num_layers))
        and found["experts"] == [f"adapter{k}" for k in range(4)]
    )
    batch = Collator(processor)(pictures("q", 3))
    for layer, site in enumerate(method.adapters.sites.values()):
        index = site.router(torch.zeros(3, 1, method.adapters.anatomy.hidden_size), method.adapters.instructions(batch)).index
        expected = index.bincount(minlength=4) / 3
        torch.testing.assert_close(torch.tensor(found["weights"][1][layer]), expected)


def test_numbers_out_of_range_are_refused():
    for options in ({"single_ratio": 1.5}, {"load_balance": -1.0}):
        with pytest.raises(UserError, match="a share \\(0 to 1\\)"):
            METHODS["mome"](build("llava")[0], settings=SETTINGS, **options)
