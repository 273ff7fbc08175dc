"""Tune at several budgets and certify the smallest that loses no more than allowed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avlprof.analysis import Profile
from avlprof.errors import UserError, counted
from avlprof.evaluation.answers import AnswerSettings, prompt_lengths
from avlprof.evaluation.certificate import Certificate, Claim, certify
from avlprof.files import write_text
from avlprof.models import LoadedModel
from avlprof.policy import Policy, save_policy
from avlprof.tasks import Sample, Task
from avlprof.tuning.prepared import Generated, answer_store
from avlprof.tuning.settings import Settings
from avlprof.tuning.sweep import Sweep, sweep
from avlprof.tuning.workers import Workers
from avlprof.watch import SILENT, Watch

FILE = "certificate.json"


@dataclass(frozen=True)
class Certified:
    """A sweep, and what samples that neither its searches nor its proofs saw certify of it."""

    sweep: Sweep
    certificate: Certificate

    @property
    def policy(self) -> Policy | None:
        """The winner at the certified budget; None where none is certified."""
        studies = {budget_of(one.policy): one for one in self.sweep.studies}
        budget = self.certificate.budget
        return None if budget is None else studies[budget].policy

    def write(self) -> Path:
        """The tests as JSON in the folder of the sweep, and the certified policy beside it, or none."""
        path = self.sweep.folder / FILE
        certificate = self.certificate
        record = {
            "max_drop": certificate.drop,
            "confidence": certificate.confidence,
            "budget": certificate.budget,
            "tests": [asdict(test) for test in certificate.tests],
            "sentence": certificate.sentence(),
        }
        write_text(path, json.dumps(record, indent=1) + "\n")
        chosen = self.sweep.folder / "policy.yaml"
        if self.policy is not None:
            save_policy(self.policy, chosen)
        else:  # what an earlier claim had certified is not what the tests beside it say
            chosen.unlink(missing_ok=True)
        return path


def certified(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    claim: Claim,
    settings: Settings | None = None,
    *,
    workers: Workers | None = None,
    watch: Watch = SILENT,
) -> Certified:
    """Tune and prove at several budgets, then test them from the largest down; the same call resumes.

    The tests are made on samples of the proof's split behind those of the proof: the policies are fixed
    before anybody looks at them, which is what a certificate needs.

    Raises:
        UserError: as `sweep`, or the split has no samples left for the tests.
    """
    settings = settings or Settings()
    fresh = fresh_samples(task, settings, claim.samples)
    swept = sweep(loaded, task, profile, folder, claim.budgets, settings, workers=workers, watch=watch)
    if len(fresh) < claim.samples:
        watch.say(
            f"split '{settings.proof_split}' has {counted(len(fresh), 'sample')} left for the certificate, "
            f"not {claim.samples}"
        )
    limit, lengths = settings.answer_limit(task), prompt_lengths(loaded, fresh)
    answering = AnswerSettings(limit, settings.batch_size, task.metric, lengths)
    answers = Generated(loaded, fresh, answering, answer_store(folder))
    policies = {budget_of(one.policy): one.policy for one in swept.studies}
    watch.phase("certificate", 0, len(policies) + 1)
    dense = answers.metric(None)
    made: list[float] = []

    def drops(budget: float) -> NDArray[np.float64]:
        watch.phase("certificate", len(made) + 1, len(policies) + 1)
        made.append(budget)
        return dense - answers.metric(policies[budget])

    certificate = certify(claim, drops)
    watch.phase("certificate", len(policies) + 1, len(policies) + 1)
    result = Certified(swept, certificate)
    result.write()
    return result


def fresh_samples(task: Task, settings: Settings, count: int) -> list[Sample]:
    """Samples behind those of the proof, `count` of them or what there is.

    Raises:
        UserError: there is none.
    """
    left = task.samples(settings.proof_split, settings.proof_samples + count)[settings.proof_samples :]
    if not left:
        raise UserError(
            f"split '{settings.proof_split}' of task '{task.name}' has no samples behind the "
            f"{settings.proof_samples} of the proof, which a certificate needs; give fewer proof_samples"
        )
    return left


def budget_of(policy: Policy) -> float:
    """The memory budget that a tuned policy was made for."""
    budget = policy.provenance.budget if policy.provenance else None
    assert budget is not None
    return budget
