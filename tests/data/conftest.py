import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGENET_SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"


def encode(pixels: np.ndarray, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, file_format, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """scikit-learn's two photographs, 427 x 640, as JPEG."""
    from sklearn.datasets import load_sample_images

    return [encode(image, "JPEG", quality=95) for image in load_sample_images().images]


@pytest.fixture(scope="session")
def imagenet_sample() -> list[Path]:
    """Real ImageNet files, where they are present."""
    files = sorted(IMAGENET_SAMPLE.glob("*.JPEG"))
    if not files:
        pytest.skip(f"no ImageNet photographs in {IMAGENET_SAMPLE}")
    return files


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """root/class/*.png: three classes of 8, 7 and 6 images, each of one colour of its own."""
    root = tmp_path / "images"
    colour = 0
    for name, count in (("ant", 8), ("bee", 7), ("cat", 6)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((10, 12, 3), colour, np.uint8)
            (root / name / f"{i:02}.png").write_bytes(encode(pixels))
            colour += 1
    return root
