"""The mean corruption error of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261)."""

from collections.abc import Mapping

SEVERITIES = (1, 2, 3, 4, 5)

# AlexNet's top-1 error, mean over the five severities: the unit in which each corruption's error
# is measured (section 4.1). From the spreadsheet that the README of the authors' code,
# github.com/hendrycks/robustness, links under "Calculating the mCE".
ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def corruption_errors(errors: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Each corruption's error in units of AlexNet's: CE = Σ_s E_s / Σ_s E_s(AlexNet).

    Args:
      errors: top-1 error in [0, 1] by corruption and severity, all 15 × 5.

    Returns:
      Corruption to CE; 1 is AlexNet.
    """
    return {
        name: sum(errors[name, severity] for severity in SEVERITIES) / len(SEVERITIES) / alexnet
        for name, alexnet in ALEXNET_ERRORS.items()
    }


def mean_corruption_error(errors: Mapping[tuple[str, int], float]) -> float:
    """The mCE, the mean of `corruption_errors` over the 15 corruptions; 1 is AlexNet."""
    each = corruption_errors(errors)
    return sum(each.values()) / len(each)
