"""The paper's numbers on adaptation, as it prints them (percent), to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Incremental:
    """A cell group of Table 6: accuracy on task A and on task B after B is learned, in percent."""

    task_a: float
    task_b: float

    @property
    def average(self) -> float:
        return (self.task_a + self.task_b) / 2


SETTINGS = (
    "mlp-mnist",
    "mlp-fmnist",
    "alexnet-cifar10",
    "vgg16-cifar10",
    "resnet101-cifar10",
    "vgg19-imagenet10",
)

# A row of Table 6 (RQ4): task A and task B for the settings in the order of SETTINGS.
TABLE_6_ROWS = {
    "original": ((98.92, 0.00), (97.44, 0.00), (89.14, 0.00),
                 (92.52, 0.00), (96.90, 0.00), (92.15, 0.00)),
    "retrain": ((0.00, 98.50), (2.78, 83.28), (0.00, 89.40),
                (0.00, 90.80), (0.00, 85.86), (5.37, 88.92)),
    "replay-5": ((87.54, 98.32), (83.96, 83.14), (46.32, 88.94),
                 (54.42, 90.76), (26.54, 85.00), (85.62, 87.77)),
    "replay-10": ((91.86, 98.13), (87.90, 83.20), (59.70, 88.16),
                  (62.80, 90.12), (39.40, 84.68), (87.23, 88.38)),
    "replay-100": ((97.20, 97.48), (94.44, 81.78), (82.96, 85.66),
                   (86.98, 88.30), (84.12, 90.18), (90.46, 89.38)),
    "deeparc": (None, None, (0.00, 84.84), (20.44, 0.00), (46.68, 0.00), (0.00, 84.92)),
    "neusemslice": ((98.89, 97.20), (92.12, 82.08), (84.65, 87.60),
                    (85.77, 86.98), (97.12, 82.52), (91.77, 90.54)),
    "neusemslice-replay-10": ((98.94, 97.17), (96.96, 81.90), (87.22, 86.66),
                              (91.38, 86.02), (98.52, 81.46), (92.54, 90.38)),
}  # fmt: skip

TABLE_6 = {
    (setting, method): Incremental(*cells)
    for method, row in TABLE_6_ROWS.items()
    for setting, cells in zip(SETTINGS, row, strict=True)
    if cells is not None
}
"""(setting, method) -> what the paper prints; it has no DeepArc for the two small MLPs."""

# What the paper's text says of Table 6: mean points of task A that each method loses.
TASK_A_LOST = {
    "replay-5": 30.45,
    "replay-10": 23.03,
    "replay-100": 5.15,
    "neusemslice": 2.79,
    "neusemslice-replay-10": 0.25,
}
AVERAGE_ACCURACY = {"neusemslice": 89.77, "neusemslice-replay-10": 90.76}


@dataclass(frozen=True)
class Readaptation:
    """A cell group of Table 5: TPR, RA and RAA in percent."""

    tpr: float
    ra: float
    raa: float


# Table 5 (RQ3): the TPR of each method for the settings in the order of SETTINGS.
TABLE_5_TPR = {
    "full": (100.00, 100.00, 100.00, 100.00, 100.00, 100.00),
    "deeparc": (75.01, 75.01, 99.18, 67.60, 56.26, 95.82),
    "neusemslice": (26.74, 49.26, 33.95, 87.41, 86.35, 85.22),
    "neusemslice-deeparc": (24.17, 40.29, 33.21, 60.39, 47.30, 81.12),
}

# RA and RAA of each attack and method, likewise.
TABLE_5_ROWS = {
    ("fgsm", "full"): ((100.00, 14.20), (98.25, 10.10), (98.40, 43.90),
                       (97.83, 13.10), (100.00, 49.50), (98.54, 48.59)),
    ("fgsm", "deeparc"): ((100.00, 13.40), (97.18, 11.20), (99.43, 50.40),
                          (98.80, 13.70), (100.00, 53.60), (98.44, 42.66)),
    ("fgsm", "neusemslice"): ((100.00, 18.10), (97.72, 11.40), (99.55, 46.10),
                              (99.60, 15.70), (100.00, 54.20), (98.78, 47.66)),
    ("fgsm", "neusemslice-deeparc"): ((100.00, 21.20), (98.00, 11.50), (100.00, 52.70),
                                      (99.88, 37.30), (100.00, 54.60), (98.85, 44.22)),
    ("pgd", "full"): ((100.00, 14.00), (97.90, 6.00), (97.68, 1.30),
                      (95.80, 2.90), (99.00, 0.90), (99.38, 22.81)),
    ("pgd", "deeparc"): ((100.00, 12.00), (97.37, 7.20), (99.95, 0.10),
                         (99.53, 0.00), (95.30, 4.20), (99.11, 20.78)),
    ("pgd", "neusemslice"): ((100.00, 12.90), (97.90, 5.80), (99.30, 1.40),
                             (99.75, 0.00), (99.40, 1.40), (99.18, 20.16)),
    ("pgd", "neusemslice-deeparc"): ((100.00, 12.60), (97.92, 8.10), (98.98, 0.30),
                                     (99.83, 0.00), (98.93, 4.40), (99.41, 24.06)),
}  # fmt: skip

TABLE_5 = {
    (setting, attack, method): Readaptation(TABLE_5_TPR[method][column], *row[column])
    for (attack, method), row in TABLE_5_ROWS.items()
    for column, setting in enumerate(SETTINGS)
}
"""(setting, attack, method) -> what the paper prints."""

# What the paper's text says of Table 5, over its six settings (section 5.4).
BEFORE = {"fgsm": 18.53, "pgd": 3.80}  # accuracy on the adversarial samples, percent
MEAN_TPR = {"neusemslice": 61.49, "neusemslice-deeparc": 47.75}
RA_GAIN = {"neusemslice": 0.67, "neusemslice-deeparc": 0.73}  # points on full training
TRAINING_TIME = {"neusemslice": 93.53, "neusemslice-deeparc": 89.80}  # percent of full training's
