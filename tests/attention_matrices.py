"""Conversations with images, and the attention that whole matrices give them."""

import torch

from alula import Message, Sample
from alula.evaluation.attention_shift import SEGMENTS
from alula.models.anatomy import anatomy
from zoo.parts import picture


def sample(text, *, images=1, answer="a red square", number=0):
    shown = tuple(picture(10 * number + index, 40, 60) for index in range(images))
    return Sample(id=f"{number}", messages=(Message(role="user", content=text), Message(role="assistant", content=answer)), images=shown)


def samples():
    """Of different lengths; one text only, one with text between two images, all longer than Gemma's sliding window."""
    return [
        sample("look at this picture: <image>\nwhat colour is the square? and how many circles are there?", number=1),
        sample("describe <image>\n briefly, please, and say whether it is red or blue", number=2, answer="no"),
        sample("what colour is the square, one two three four five six seven eight nine ten?", images=0, number=3),
        sample("first <image>\n then what about this one: <image>\n are they equal? yes or no?", images=2, number=4),
    ]


def explicit(model, batch):
    """Batch x layers x segments from whole attention matrices of the eager attention, one token after another."""
    model.set_attn_implementation("eager")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, use_cache=False)
    matrices = getattr(output, "language_model_outputs", output).attentions  # BLIP-2 keeps its decoder's apart
    return from_matrices(model, batch, matrices)


def from_matrices(model, batch, matrices):
    token = anatomy(model).image_token_id
    rows = []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)):
        images = [place for place, one in enumerate(ids) if one == token]
        names = {}
        for place in (place for place, is_token in enumerate(mask) if is_token):
            names[place] = (
                "itself"
                if place in images
                else "before"
                if not images or place < images[0]
                else "after"
                if place > images[-1]
                else "between"
            )
        layers = []
        for matrix in matrices:
            weights = matrix[row].mean(dim=0)  # over heads
            totals = dict.fromkeys(SEGMENTS, 0.0)
            for query in names:
                for key, name in names.items():
                    totals[name] += float(weights[query, key]) / len(names)
            layers.append([totals[name] for name in SEGMENTS])
        rows.append(layers)
    return torch.tensor(rows)
