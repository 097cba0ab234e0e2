"""What a report shows and what its words mean. Measures say themselves what they are; tooltips and the last section show it."""

from alula.evaluation.measures import MEASURES

MAIN = ("average_score", "backward_transfer", "forgetting", "base_forgetting", "base_bits_increase", "unparsed_share")
"""The columns of the first table."""

METRICS = (*(MEASURES[name] for name in MAIN),)
OTHER_METRICS = (*(MEASURES[name] for name in MEASURES if name not in MAIN),)

TERMS = (
    ("Score matrix", "Row i, column j: score on task j after i tasks. Row 0 is the untouched base model."),
    ("Series", "A method and, where a trained model can be used in several ways, the arm: method:arm."),
    ("Cell", "One method with one seed in one order of the tasks."),
    ("Joint, oracle", "References, not ways to learn: trained on all tasks at once; told which task each sample is from."),
    (
        "Interval [a, b]",
        "95 % bootstrap over test samples, drawn again within each task (1000 times), for the cells that were run. The same "
        "draws serve every series, so differences are paired. It says nothing of other seeds or orders.",
    ),
    ("± s", "Standard deviation over cells, that is over seeds and task orders: what another start or order would change."),
    (
        "Against joint or specialist",
        "The reference's cell with the same seed and order where there is one, else the mean over its cells; its last row.",
    ),
    ("Lost, gained", "Samples right after learning the task and wrong at the end; wrong then and right at the end."),
    ("Right expert", "Mean weight the router gives to the expert that was trained on the task, over tokens and layers."),
    ("Top-1 margin", "Mean difference between the largest and the second largest weight: how decided the router is."),
    ("Gate cosine", "Cosine between the gates of two experts: near 1, the router cannot tell the two apart."),
    ("Oracle gap", "Average score with the right expert told, minus with the router: what routing costs."),
    ("False use", "Mean weight of all experts on a base task, where none should speak."),
)
