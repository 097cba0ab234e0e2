"""Methods with additions on a tiny text model, and how they learn."""

from alula.methods import METHODS, compose
from alula.training import Trainer
from resume_worker import SETTINGS, collate, stream, tiny_model

ONE_STEP = SETTINGS.model_copy(update={"steps": 1, "micro_batch_size": None})


def tiny(name, *additions, settings=SETTINGS, **options):
    """A method on a tiny text model without dropout, with additions: names or (name, options)."""
    model = tiny_model().eval()
    method = METHODS[name](model, settings=settings, **options)
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in additions]
    return model, compose(model, method, pairs, collator=collate)


def learn(model, method, tasks=None, *, folder=None, collator=collate):
    trainer = Trainer(model, method, collator, settings=method.settings, folder=folder)
    return list(trainer.learn(tasks or stream()))
