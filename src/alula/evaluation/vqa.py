"""How published few-shot evaluations cut and compare short answers. It knows no model.

Source: OpenFlamingo (Awadalla et al. 2023, https://arxiv.org/abs/2308.01390), ``eval/vqa_metric.py`` and ``eval/eval_model.py``, which
follow the evaluation of VQA (Antol et al. 2015, https://visualqa.org/evaluation.html). Deliberate differences: answers are
normalised also where all references agree; "." is dropped exactly where it is no decimal point (the published pattern misspells its
look-behind); and the score is an exact match, not agreement with ten annotators.
"""

import re

NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = (
    " aint arent cant couldve couldnt couldntve didnt doesnt dont hadnt hadntve hasnt havent hed hedve hes howd howll hows isnt itd itdve "
    "itll maam mightnt mightntve mightve mustnt mustve neednt notve oclock oughtnt owsat shant shedve shouldve shouldnt shouldntve "
    "somebodyd somebodydve somebodyll somebodys someoned someonedve someonell someones somethingd somethingdve somethingll thats thered "
    "theredve therere theres theyd theydve theyll theyre theyve twas wasnt wedve weve werent whatll whatre whats whatve whens whered "
    "wheres whereve whod whodve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldntve yall yallll yalldve youd youdve youll "
    "youre youve "
)
"""Words that count as the same with and without their apostrophes."""
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?<!\d)\.|\.(?!\d)")
STOPS = {
    "vqa": re.compile(r"\n|Question|Answer|Short|[.,](?=\s|$)"),
    "caption": re.compile(r"\n|A photo of|\.(?=\s|$)"),
}
"""Where an answer ends, by the form of its prompt: at a line break, a full stop, where the next prompt begins; one of a
question also at a comma."""


def cut_answer(text: str, *, form: str) -> str:
    """`text` up to the first stop of its form.

    Example:
        >>> cut_answer("red, I think. Question: what", form="vqa")
        'red'
    """
    return STOPS[form].split(text.strip(), maxsplit=1)[0].strip()


def normalise_vqa(text: str) -> str:
    """`text` as it is compared: lower case, without punctuation and articles, numbers as digits.

    A sign that has a blank beside it somewhere, or beside a number with a comma, vanishes; else it becomes a blank.

    Example:
        >>> normalise_vqa("The two dogs, don't!") == normalise_vqa("2 dogs dont")
        True
    """
    text = " ".join(text.split())
    has_comma = COMMA_IN_NUMBER.search(text) is not None
    bare = text
    for sign in PUNCTUATION:
        bare = bare.replace(sign, "" if f"{sign} " in text or f" {sign}" in text or has_comma else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", bare).lower().split()]
    kept = [word for word in words if word not in ARTICLES]
    return " ".join(joined if _is_contraction(joined := word.replace("'", "")) else word for word in kept)


def _is_contraction(word: str) -> bool:
    return f" {word} " in CONTRACTIONS
