"""What is not arithmetic: batches are made ahead, scores only where they are read, frozen encoders asked once; nothing else changes."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import GenerationMixin

from alula import Collator, Sample, Stream, Task, Trainer, TrainSettings
from alula.data.ahead import made_ahead
from alula.evaluation.evaluate import evaluate_task
from alula.files import read_jsonl
from alula.methods import METHODS
from alula.methods.base import plain_logits
from alula.models.logits import keeping
from alula.objectives import at_targets, columns_needed, distillation_loss, next_token_loss, soft_target_loss
from alula.training.order import Steps, reseed
from resume_worker import pictures
from zoo import BUILDERS, NO_TEXT_ONLY, build

FAST = TrainSettings(steps=5, batch_size=2, learning_rate=1e-2)


def test_items_are_made_in_order_by_one_thread_at_most_two_ahead():
    made, threads = [], set()

    def make(key):
        threads.add(threading.current_thread().name)
        made.append(key)
        return -key

    for place, item in enumerate(made_ahead(make, range(6))):
        time.sleep(0.02)
        assert item == -place and made == list(range(min(6, place + 3)))
    assert len(threads) == 1 and threading.current_thread().name not in threads


def test_what_cannot_be_made_is_said_where_it_would_have_come():
    coming = made_ahead(lambda key: 1 / key, [2, 1, 0, 4])
    assert [next(coming), next(coming)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_an_iterator_that_is_left_leaves_no_thread():
    before, made = threading.active_count(), []
    coming = made_ahead(made.append, range(1000))
    next(coming)
    coming.close()
    assert threading.active_count() == before and len(made) <= 3


@pytest.mark.parametrize("ask_between", [0, 9])
def test_the_order_of_an_epoch_is_right_whichever_thread_asks(ask_between):
    steps = Steps(range(7), list, batch_size=3, micro_batch_size=None, seed=0, task="t", stage="s")
    expected = [steps.indices(step) for step in range(8)]
    with steps.loader(range(8), num_workers=0) as batches:
        for step, batch in enumerate(batches):
            steps.indices(ask_between)
            assert batch == [expected[step]]


class Slow(Collator):
    """Notes when a batch is made, by which thread, and whether somebody computes meanwhile."""

    computing = overlapped = False

    def __call__(self, samples):
        for _ in range(50):
            Slow.overlapped |= Slow.computing
            time.sleep(0.001)
        return super().__call__(samples)

    def prompts(self, samples):
        self(samples)
        return super().prompts(samples)


@pytest.fixture
def watched():
    """A tiny model whose forwards are noted, and a collator that notices them."""
    model, processor = build("llava")
    Slow.computing = Slow.overlapped = False

    def begin(*_):
        Slow.computing = True
        time.sleep(0.03)

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(lambda *_: setattr(Slow, "computing", False))
    return model, Slow(processor)


def test_the_next_batch_is_made_while_a_step_computes(watched):
    model, collator = watched
    method = METHODS["finetune"](model, settings=FAST, rank=2)
    trainer = Trainer(model, method, collator, settings=FAST, folder=None)
    list(trainer.learn(Stream(tasks=(Task(name="colours", train=pictures("colours", 6), test=[]),))))
    assert Slow.overlapped


def test_the_next_batch_is_made_while_answers_are_generated(watched):
    model, collator = watched
    evaluate_task(model, collator, Task(name="colours", train=[], test=pictures("colours", 6), max_new_tokens=2), batch_size=2)
    assert Slow.overlapped


def test_logits_that_begin_at_the_first_target_give_every_loss_bit_for_bit():
    logits, labels = torch.randn(3, 9, 11), torch.full((3, 9), -100)
    labels[0, 4:6], labels[1, 7], labels[2, 0] = 5, 2, 3  # the last is no target: nothing predicts a row's first token
    needed = columns_needed(labels)
    assert needed == 6
    cut, teacher = logits[:, -needed:], torch.randn(3, 9, 11)
    assert all(torch.equal(*pair) for pair in zip(at_targets(cut, labels), at_targets(logits, labels), strict=True))
    assert torch.equal(next_token_loss(cut, labels), next_token_loss(logits, labels))
    for dilute in (False, True):
        assert torch.equal(soft_target_loss(cut, labels, dilute=dilute), soft_target_loss(logits, labels, dilute=dilute))
    assert torch.equal(distillation_loss(cut, teacher[:, -needed:], labels), distillation_loss(logits, teacher, labels))


def test_without_a_target_every_column_is_kept():
    assert columns_needed(torch.full((2, 4), -100)) == 4
    assert columns_needed(torch.tensor([[3], [4]])) == 1


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "florence2"])
def test_a_model_that_leaves_logits_out_gives_the_others_as_before(name):
    model, processor = build(name)
    shown = pictures("p", 1)[0].images
    asked = {"what?": shown, "how many red circles are there?": shown if name in NO_TEXT_ONLY else ()}
    rows = [Sample.ask(text, "red", images=images) for text, images in asked.items()]
    if processor.chat_template is None:
        pytest.skip("no conversation can be written for it")
    batch = Collator(processor)(rows)
    with torch.no_grad():
        cut = plain_logits(model, batch)
        whole = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    needed = columns_needed(batch["labels"])
    assert needed < batch["labels"].shape[1]
    assert cut.shape[1] == (needed if keeping(model, 1) else whole.shape[1])
    torch.testing.assert_close(cut, whole[:, -cut.shape[1] :], rtol=1e-5, atol=1e-5)


def test_a_step_learns_the_same_from_the_logits_it_needs(tmp_path, monkeypatch):
    for name in ("cut", "whole"):
        if name == "whole":
            monkeypatch.setattr("alula.methods.base.keeping", lambda model, number: {})
        model, processor = build("llava")
        trainer = Trainer(
            model, METHODS["finetune"](model, settings=FAST, rank=2), Collator(processor), settings=FAST, folder=tmp_path / name
        )
        list(trainer.learn(Stream(tasks=(Task(name="colours", train=pictures("colours", 6), test=[]),))))
    cut, whole = ([row["loss"] for row in read_jsonl(tmp_path / name / "losses.jsonl")] for name in ("cut", "whole"))
    assert cut == pytest.approx(whole, rel=1e-5) and len(cut) == 5


def test_generation_stops_when_every_row_has_ended(monkeypatch):
    model, processor = build("llava")
    model.generation_config.eos_token_id = None  # the tokenizer alone knows how an answer ends
    end, calls = processor.tokenizer.eos_token_id, []

    def force(module, args, kwargs, output):
        calls.append(output.logits.shape[1])
        output.logits[:, -1, end] = 1e4
        return output

    model.register_forward_hook(force, with_kwargs=True)
    task = Task(name="colours", train=[], test=pictures("colours", 3), max_new_tokens=9)
    found = evaluate_task(model, Collator(processor), task, batch_size=3)
    assert [row.output for row in found] == ["", "", ""]
    assert calls == [1], "one forward for all rows, with one column of logits"
    assert isinstance(model, GenerationMixin)


def test_reading_a_built_in_task_imports_no_pandas():
    code = "import sys\nfrom alula.data.tasks.asset_table import read_table\nassert read_table('capital')\nprint('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False"]


def test_a_step_is_seeded_as_torch_seeds_everything():
    torch.manual_seed(7)
    expected = torch.rand(3)
    reseed(7, device=torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
