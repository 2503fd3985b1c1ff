"""nnU-Net 2.8 as its users run it, timed: Dice on held-out cases against seconds of training.

    python nnunet_training.py DATASET RESULTS.jsonl --seconds 1500 --every 60

Run by benchmarks/time_to_dice.py with the interpreter of an environment that has nnunetv2. Its own
fingerprint, plan (3d_fullres), loaders, trainer and schedule; fold 0. The clock counts training
steps alone. Whole held-out cases are predicted by its own sliding window, without mirroring, in
between. Each line of the results holds seconds, steps and the mean Dice of each class.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NAME = "Dataset004_Hippocampus"
TARGETS = (0.80, 0.85)


def raw_dataset(source: Path, folder: Path) -> None:
    """The Decathlon's dataset in nnU-Net's own form, by links."""
    content = json.loads((source / "dataset.json").read_text())
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for entry in content["training"]:
        image, label = source / entry["image"], source / entry["label"]
        case = label.name.removesuffix(".nii.gz")
        (folder / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(image.resolve())
        (folder / "labelsTr" / f"{case}.nii.gz").symlink_to(label.resolve())
    described = {
        "channel_names": content["modality"],
        "labels": {name: int(number) for number, name in content["labels"].items()},
        "numTraining": len(content["training"]),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described))


def main() -> None:
    """Prepare, train against the clock, and write what is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--every", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[name] = f"{work}/{name}"
        os.environ["nnUNet_n_proc_DA"] = "1"  # noqa: SIM112 (its own name)
        raw_dataset(options.dataset, Path(work, "nnUNet_raw", NAME))
        started = time.perf_counter()
        command = [f"{Path(sys.executable).parent}/nnUNetv2_plan_and_preprocess"]
        command += ["-d", "4", "-c", "3d_fullres", "-np", "2"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        write(options.results, {"preparation": time.perf_counter() - started})
        train(options.results, options.seconds, options.every)


def train(results: Path, limit: float, every: float) -> None:
    """Steps of its trainer until the limit, or until the last target is reached."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args("4", "3d_fullres", 0, device=torch.device("cpu"))
    trainer.on_train_start()
    _, held_out = trainer.do_split()
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, held_out)
    predictor = nnUNetPredictor(
        use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False, verbose=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        "nnUNetTrainer",
        None,
    )
    seconds, next_look, steps = 0.0, every, 0
    trainer.on_train_epoch_start()
    while seconds < limit:
        started = time.perf_counter()
        trainer.train_step(next(trainer.dataloader_train))
        seconds += time.perf_counter() - started
        steps += 1
        if seconds >= next_look or seconds >= limit:
            next_look += every
            dice = score(trainer, predictor, dataset, held_out)
            write(results, {"seconds": seconds, "steps": steps, "dice": dice})
            trainer.on_train_epoch_start()
            if np.mean(dice) >= max(TARGETS):
                break
    trainer.dataloader_train._finish()
    trainer.dataloader_val._finish()


def score(trainer, predictor, dataset, held_out: list[str]) -> list[float]:  # type: ignore[no-untyped-def]
    """Mean Dice of each class over the held-out cases, on the network's grid."""
    import torch

    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    dice = []
    for case in held_out:
        data, label, _, _ = dataset.load_case(case)
        image = torch.from_numpy(np.ascontiguousarray(data[:], dtype=np.float32))
        with torch.inference_mode():
            logits = predictor.predict_sliding_window_return_logits(image)
        found, truth = logits.argmax(0).numpy(), np.asarray(label[:])[0]
        dice.append(
            [
                2 * np.sum((found == c) & (truth == c)) / (np.sum(found == c) + np.sum(truth == c))
                for c in range(1, len(logits))
            ]
        )
    trainer.set_deep_supervision_enabled(True)
    return [float(value) for value in np.mean(dice, axis=0)]


def write(path: Path, line: dict[str, object]) -> None:
    """Add a line to the results."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
