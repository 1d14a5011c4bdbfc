# SPDX-License-Identifier: Apache-2.0
"""Held-out digits from half of their pixels, from a quarter, and from other measurements, by a trained pipeline.

    python tests/benchmarks/digits_inverse.py runs/unet-digits --output_dir runs/inverse

Prints for each measurement how far it is missed, the error of the drawn pixels, and how often the plain classifier of
`digits_judge.py` reads the original's label in them, with the label unknown to the pipeline and known to it. Of
half digits the label is not certain: a classifier of halves says how often a draw from the posterior would have it.
`inpainting.png` has a row for each of ten digits: the original, its known half, and six completions without label.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from digits_judge import load_split, train_classifier
from labelled import labelled
from sklearn.svm import SVC

from diffusers_fm import FlowMatchInversePipeline
from diffusers_fm.applications.operators import (
    BlurOperator,
    CompressedOperator,
    DownsampleOperator,
    LinearOperator,
    MaskOperator,
)


# Standard deviation of the digits around their mean, for pixels in [-1, 1].
SIGMA_DATA = 0.54


def measurements() -> dict[str, tuple[LinearOperator, float]]:
    """Operators by name, and the noise of the measurement."""
    left, top = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :4], top[:4] = 1, 1
    return {
        "left half": (MaskOperator(left), 0.0),
        "upper half": (MaskOperator(top), 0.0),
        "2x2 blocks": (DownsampleOperator(2), 0.0),
        "2x2 blocks, noise 0.2": (DownsampleOperator(2), 0.2),
        "blur of 1 pixel, noise 0.1": (BlurOperator.gaussian(1.0), 0.1),
        "16 of 64, compressed": (CompressedOperator((1, 8, 8), 16), 0.0),
    }


def posterior_accuracy(rows: slice, columns: slice) -> float:
    """Rate at which a label drawn from a classifier's posterior, given a part of a held-out digit, is the true one."""
    (images, labels), (held_out, truth) = load_split("train"), load_split("test")
    part = (slice(None), rows, columns)
    classifier = SVC(gamma=0.4, C=10, probability=True, random_state=0)
    classifier.fit(images[part].reshape(len(images), -1), labels)
    shares = classifier.predict_proba(held_out[part].reshape(len(held_out), -1))
    return float(shares[np.arange(len(truth)), truth].mean())


def draw_picture(pipeline: FlowMatchInversePipeline, images: torch.Tensor, labels: np.ndarray, path: Path) -> None:
    """Originals, their left halves, and six completions of each, magnified."""
    chosen = torch.stack([images[int((labels == digit).argmax())] for digit in range(10)])
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    completions = pipeline(
        image=chosen,
        mask_image=mask,
        class_labels=pipeline.null_class,
        num_images_per_measurement=6,
        sigma_data=SIGMA_DATA,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    known = torch.where(mask.bool(), 0.5, chosen)
    rows = torch.cat([chosen[:, None], known[:, None], completions.reshape(10, 6, 1, 8, 8)], 1)[:, :, 0]
    padded = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
    grid = padded.permute(0, 2, 1, 3).reshape(10 * 10, 8 * 10)
    picture = PIL.Image.fromarray((grid * 255).round().byte().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled(picture, ["original", "known", *"123456"], scale=5).save(path)


def main(folder: str, output_dir: Path, num_inference_steps: int) -> None:
    """Prints the table and draws the picture."""
    judge = train_classifier(*load_split("train"))
    held_out, labels = load_split("test")
    images = torch.from_numpy(held_out)[:, None].float()
    pipeline = FlowMatchInversePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    halves = {
        "left half": posterior_accuracy(slice(None), slice(4)),
        "upper half": posterior_accuracy(slice(4), slice(None)),
    }
    columns = f"{'missed by':>10}{'error':>8}{'of A^+':>8}{'label':>8}{'unknown':>9}  posterior"
    print(f"{'measurement':28}{'method':24}{columns}")
    for name, (operator, noise_level) in measurements().items():
        generator = torch.Generator().manual_seed(1)
        measured = operator.forward(2 * images - 1)
        measured = measured + noise_level * torch.randn(measured.shape, generator=generator)
        naive = (operator.pseudo_inverse(measured).clamp(-1, 1) + 1) / 2
        for method, covariance in (("projection", ""), ("guided", "isotropic"), ("guided", "jacobian")):
            start = time.process_time()
            outputs = [
                pipeline(
                    measured,
                    operator,
                    noise_level=noise_level,
                    method=method,
                    covariance=covariance or "isotropic",
                    sigma_data=SIGMA_DATA,
                    class_labels=given,
                    num_inference_steps=num_inference_steps,
                    generator=torch.Generator().manual_seed(0),
                    output_type="pt",
                )
                for given in (labels, [pipeline.null_class] * len(labels))
            ]
            scores = [judge.score(output.images.flatten(1).numpy(), labels) for output in outputs]
            errors = [(found - images).square().mean().sqrt().item() for found in (outputs[1].images, naive)]
            missed = outputs[1].residuals.max().item()
            print(
                f"{name:28}{method + ' ' + covariance:24}{missed:10.1e}{errors[0]:8.3f}{errors[1]:8.3f}"
                f"{scores[0]:8.1%}{scores[1]:9.1%}  {halves.get(name, float('nan')):.1%}"
                f"  ({outputs[1].nfe} calls, {outputs[1].num_backward} backward,"
                f" {time.process_time() - start:.0f} s of CPU)",
                flush=True,
            )
    draw_picture(pipeline, images, labels, output_dir / "inpainting.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/inverse"))
    parser.add_argument("--num_inference_steps", type=int, default=50)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.output_dir, arguments.num_inference_steps)
