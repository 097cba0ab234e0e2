"""What each number of a report means, in words a reader can check. Tooltips and the last section come from here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of the summary table.

    Attributes:
        unit: ``points`` (a hundredth of a score), ``bits`` (a byte of prose) or ``%``.
        better: ``higher`` or ``lower``.
    """

    name: str
    label: str
    unit: str
    better: str
    meaning: str
    source: str = ""

    @property
    def scale(self) -> float:
        """What a stored value is multiplied with to be shown in `unit`."""
        return 1.0 if self.unit == "bits" else 100.0


METRICS = (
    Metric(
        name="average_score",
        label="Average score",
        unit="points",
        better="higher",
        meaning="Mean score over the tasks seen, after the last one: what the model can do now.",
        source="Lopez-Paz & Ranzato 2017 (GEM), ACC",
    ),
    Metric(
        name="backward_transfer",
        label="Backward transfer",
        unit="points",
        better="higher",
        meaning="Mean over all tasks but the last: score at the end minus score right after learning. Negative = worse.",
        source="Lopez-Paz & Ranzato 2017 (GEM), BWT",
    ),
    Metric(
        name="forgetting",
        label="Forgetting",
        unit="points",
        better="lower",
        meaning="Mean over all tasks but the last: best score at any earlier stage minus score at the end. "
        "Positive = lost. With few samples it is above zero by chance alone.",
        source="Chaudhry et al. 2018, equation 3",
    ),
    Metric(
        name="base_forgetting",
        label="Base forgetting",
        unit="points",
        better="lower",
        meaning="Mean over base tasks (never trained): score of the base model minus score at the end. Positive = lost.",
        source="linguistic forgetting, Srivastava et al. 2025",
    ),
    Metric(
        name="base_bits_increase",
        label="Base bits",
        unit="bits",
        better="lower",
        meaning="Mean over prose base tasks: bits per byte at the end minus those of the base model. Positive = lost.",
        source="ours; bits per byte as in The Pile (Gao et al. 2020)",
    ),
    Metric(
        name="unparsed_share",
        label="Unparsed",
        unit="%",
        better="lower",
        meaning="Share of the answers on tasks seen, after the last one, whose form could not be read: none of the "
        "task's known answers, or empty, or without an end. They score 0.",
        source="superficial forgetting, Chen et al. 2025 (SEFE)",
    ),
)

OTHER_METRICS = (
    Metric(
        name="learning_accuracy",
        label="Learning accuracy",
        unit="points",
        better="higher",
        meaning="Mean score on each task right after learning it.",
        source="Riemer et al. 2019",
    ),
    Metric(
        name="forward_transfer",
        label="Forward transfer",
        unit="points",
        better="higher",
        meaning="Mean over all tasks but the first: score just before learning it minus score of the base model.",
        source="Lopez-Paz & Ranzato 2017 (GEM), FWT; there the reference is a random model",
    ),
    Metric(
        name="average_over_stages",
        label="Average over stages",
        unit="points",
        better="higher",
        meaning="Mean over all stages of the average score on the tasks seen by then.",
        source="Rebuffi et al. 2017 (iCaRL)",
    ),
)

TERMS = (
    ("Score matrix", "Row i, column j: score on task j after i tasks. Row 0 is the untouched base model."),
    ("Series", "A method and, where a trained model can be used in several ways, the arm: method:arm."),
    ("Joint, oracle", "References, not ways to learn: trained on all tasks at once; told which task each sample is from."),
    (
        "Interval [a, b]",
        "95 % bootstrap over test samples, drawn again within each task (1000 times), for the seeds that were run. The same "
        "draws serve every series, so differences are paired. It says nothing of other seeds.",
    ),
    ("± s", "Standard deviation over seeds: what another start would change."),
    ("Lost, gained", "Samples right after learning the task and wrong at the end; wrong then and right at the end."),
    ("Right expert", "Mean weight the router gives to the expert that was trained on the task, over tokens and layers."),
    ("Top-1 margin", "Mean difference between the largest and the second largest weight: how decided the router is."),
    ("Gate cosine", "Cosine between the gates of two experts: near 1, the router cannot tell the two apart."),
    ("Oracle gap", "Average score with the right expert told, minus with the router: what routing costs."),
    ("False use", "Mean weight of all experts on a base task, where none should speak."),
)
