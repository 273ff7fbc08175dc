"""Train the embedded model from scratch: `python -m tools.tiny_model.train --work DIR`.

Two stages, both resumable from the last checkpoint in the work directory:

1. `tower`: the vision tower alone learns to say what each patch shows (kind, colour,
   glyph, index of a character, reading-order rank), from labels that the renderer knows.
2. `joint`: the whole model answers packed questions; the tower is frozen for the first
   part, then follows slowly while the patch labels keep it in place.

The learning rate is warm-up, constant, then linear decay over the last part. A run goes on
from its checkpoint with whatever number of images and rates it is then given; `--until` stops a
stage early, so that a schedule can be changed at a known place.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from avlprof.files import replacing, write_text
from avlprof.tasks.shapes.scene import label_sizes, patch_labels, sample_scene
from tools.tiny_model.build import LlavaRecipe
from tools.tiny_model.mrope import MropeRecipe
from tools.tiny_model.muon import Muon
from tools.tiny_model.packing import answer_logits, collate, pack, weighted_loss
from tools.tiny_model.recipe import Recipe

TRAIN_SPLIT = 1
RECIPES: dict[str, type[Recipe]] = {"tiny": LlavaRecipe, "tiny-mrope": MropeRecipe}


@dataclass(frozen=True)
class Batch:
    """The pictures of a step: pixels, labels `[B, patches, 5]`, sequences in the joint stage."""

    pixels: dict[str, Tensor]
    labels: Tensor
    sequences: dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """Size and rates of one training stage; counts are in images."""

    name: str
    images: int
    batch: int
    adam_lr: float
    muon_lr: float
    decay_share: float = 0.48
    warmup: int = 100  # steps
    until: int | None = None  # stop after so many images, before the stage is complete


class Trainer:
    """Model, patch-label heads and both optimisers, with checkpoints as safetensors."""

    def __init__(self, work: Path, recipe: Recipe, seed: int) -> None:
        self.work, self.seed, self.recipe = work, seed, recipe
        self.model: PreTrainedModel = recipe.build_model(seed)
        width = self.model.config.vision_config.hidden_size
        self.sizes = label_sizes()
        self.heads = nn.Linear(width, sum(self.sizes))

    def batch(self, stage: Stage, step: int) -> Batch:
        """The images, patch labels and packed questions of a step; a pure function of it."""
        which = 0 if stage.name == "tower" else 1
        frame = self.recipe.frame(np.random.default_rng((self.seed, TRAIN_SPLIT, which, step, 3)))
        images, labels, packed = [], [], []
        for index in range(step * stage.batch, (step + 1) * stage.batch):
            seed = (self.seed, TRAIN_SPLIT, which, index)
            wall = stage.name == "tower" and index % 2
            items, text_share = ((9, 9), 0.8) if wall else ((3, 6), 0.5)
            scene = sample_scene(seed, items, text_share, frame)
            if stage.name == "joint":
                packed.append(pack(scene, self.recipe, np.random.default_rng((*seed, 2))))
            image, label = patch_labels(scene)
            images.append(image)
            labels.append(label)
        pad = self.recipe.processor.tokenizer.pad_token_id
        return Batch(
            self.recipe.pixels(images),
            torch.from_numpy(np.stack(labels)),
            collate(packed, pad) if packed else {},
        )

    def patch_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
        """Summed cross-entropies of the label columns and the accuracy of each on ink."""
        losses, accuracies = [], []
        ink = labels[..., 0] > 0
        rare = torch.where(ink, 1.0, 0.25)
        for column, logits in enumerate(self.heads(features).split(self.sizes, dim=-1)):
            target = labels[..., column]
            each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(rare)
            losses.append((each * rare).sum() / rare.sum() * (2.0 if column == 2 else 1.0))
            accuracies.append((logits.argmax(-1) == target)[ink].float().mean().item())
        return torch.stack(losses).sum(), accuracies

    def answer_loss(self, features: Tensor, sequences: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Weighted cross-entropy of the answer tokens, and their unweighted accuracy."""
        vision = self.recipe.projected(self.model, features)
        logits, target, weights = answer_logits(self.model, vision, sequences)
        right = (logits.argmax(-1) == target).float().mean().item()
        return weighted_loss(logits, target, weights), right

    def optimizers(self, stage: Stage) -> list[torch.optim.Optimizer]:
        """Muon for hidden matrices; AdamW for embeddings, convolution, heads, norms, biases."""
        tower = self.recipe.tower(self.model)
        matrices: dict[str, list[nn.Parameter]] = {"tower": [], "rest": []}
        others: dict[str, list[nn.Parameter]] = {"tower": [], "rest": []}
        tower_ids = {id(p) for p in tower.parameters()}
        for name, param in [*self.model.named_parameters(), *self.heads.named_parameters(prefix="heads")]:
            where = "tower" if id(param) in tower_ids else "rest"
            hidden = param.ndim == 2 and "embed" not in name and "heads" not in name
            (matrices if hidden else others)[where].append(param)
        slow = 1.0 if stage.name == "tower" else 0.15
        adam = torch.optim.AdamW(
            [
                {"params": others["tower"], "lr": stage.adam_lr * slow},
                {"params": others["rest"], "lr": stage.adam_lr},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        muon = Muon(
            [
                {"params": matrices["tower"], "lr": stage.muon_lr * slow},
                {"params": matrices["rest"], "lr": stage.muon_lr},
            ],
            weight_decay=0.02,
        )
        for optimizer in (adam, muon):
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return [adam, muon]

    def run(self, stage: Stage, minutes_between_saves: float = 3.0) -> None:
        """Train one stage to its end, from its checkpoint if there is one."""
        optimizers = self.optimizers(stage)
        step = self._load(stage, optimizers)
        steps = stage.images // stage.batch
        stop = steps if stage.until is None else min(stage.until // stage.batch, steps)
        saved = started = time.monotonic()
        shown = step
        self.model.train()
        mean: dict[str, float] = {}
        while step < stop:
            rate = min(1.0, (step + 1) / stage.warmup, (steps - step) / (stage.decay_share * steps))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
            batch = self.batch(stage, step)
            frozen = stage.name == "joint" and (step < 0.4 * steps or step % 2 == 1)
            with torch.set_grad_enabled(not frozen):
                features = self.recipe.features(self.model, batch.pixels)
            report: dict[str, float] = {}
            loss = features.new_zeros(())
            if not frozen:
                patch, accuracies = self.patch_loss(features, batch.labels)
                loss = loss + patch * (1.0 if stage.name == "tower" else 0.15)
                report |= dict(zip(("kind", "color", "glyph", "index", "rank"), accuracies, strict=True))
            if stage.name == "joint":
                answers, right = self.answer_loss(features, batch.sequences)
                loss = loss + answers
                report |= {"answer_loss": answers.item(), "answer_tokens": right}
            loss.backward()  # type: ignore[no-untyped-call]
            for module in (self.model, self.heads):
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            mean = {k: mean.get(k, v) * 0.95 + v * 0.05 for k, v in report.items()} | {
                k: v for k, v in mean.items() if k not in report
            }
            if step - shown >= 50:
                speed = (step - shown) * stage.batch / (time.monotonic() - started)
                words = " ".join(f"{k} {v:.3f}" for k, v in sorted(mean.items()))
                print(f"{stage.name} {step}/{steps} {speed:.1f} images/s rate {rate:.2f} {words}", flush=True)
                started, shown = time.monotonic(), step
            if time.monotonic() - saved > 60 * minutes_between_saves or step == stop:
                self._save(stage, step, optimizers)
                saved = time.monotonic()

    def export(self, folder: Path) -> None:
        """Write the model as fp16 safetensors with its processor, loadable by the Auto classes."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() for k, v in self.model.state_dict().items()}
        half = self.recipe.build_model(self.seed).half()
        half.load_state_dict(state)
        half.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self.recipe.save_processor(folder)

    def _load(self, stage: Stage, optimizers: list[torch.optim.Optimizer]) -> int:
        path = self.work / f"{stage.name}.safetensors"
        if not path.exists():
            return 0
        tensors = load_file(path)
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.heads.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("heads.")})
        for o, optimizer in enumerate(optimizers):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, param in enumerate(params):
                prefix = f"optimizer.{o}.{i}."
                state = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
                if state:
                    optimizer.state[param] = state
        return int(json.loads((self.work / f"{stage.name}.json").read_text())["step"])

    def _save(self, stage: Stage, step: int, optimizers: list[torch.optim.Optimizer]) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        tensors["model.lm_head.weight"] = self.model.lm_head.weight.detach().clone()
        tensors |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        for o, optimizer in enumerate(optimizers):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, param in enumerate(params):
                tensors |= {f"optimizer.{o}.{i}.{k}": v.clone() for k, v in optimizer.state[param].items()}
        with replacing(self.work / f"{stage.name}.safetensors") as partial:
            save_file(tensors, partial)
        write_text(self.work / f"{stage.name}.json", json.dumps({"step": step, "stage": asdict(stage)}))


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints; resumes from it")
    parser.add_argument("--model", choices=RECIPES, default="tiny")
    parser.add_argument("--tower-images", type=int, default=20_000)
    parser.add_argument("--joint-images", type=int, default=40_000)
    parser.add_argument("--joint-adam-lr", type=float, default=8e-4)
    parser.add_argument("--joint-muon-lr", type=float, default=5e-3)
    parser.add_argument("--until", type=int, default=None, help="stop the joint stage after so many images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, default=None, help="also write the finished model here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args.work, RECIPES[args.model](), args.seed)
    if not (args.work / "joint.safetensors").exists():
        trainer.run(Stage("tower", args.tower_images, batch=8, adam_lr=1.5e-3, muon_lr=0.02))
        trainer.recipe.settle(trainer.model)
    trainer.run(
        Stage(
            "joint",
            args.joint_images,
            batch=8,
            adam_lr=args.joint_adam_lr,
            muon_lr=args.joint_muon_lr,
            until=args.until,
        )
    )
    if args.export:
        trainer.export(args.export)


if __name__ == "__main__":
    main()
