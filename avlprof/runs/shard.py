"""Which samples are a process's own when several trace into one run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from avlprof.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Process `index` of `count`; `local` counts the processes of one machine.

    A `member` of a team that shares samples out as it goes has a name, and takes what it is given.

    Processes need not talk to each other: each takes every `count`-th sample of the same list, so
    that shares are disjoint and together whole, whatever was traced before and by how many.

    Raises:
        UserError: `index` is not in [0, count), or `local` is negative.
    """

    index: int = 0
    count: int = 1
    local: int = 0
    member: str = ""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count or self.local < 0:
            raise UserError(
                f"a process must be one of 0 to count - 1 and its local number 0 or more, got process "
                f"{self.index} of {self.count}, local number {self.local}"
            )

    @property
    def prefix(self) -> str:
        """What the names of this process's parts begin with; empty for the only process."""
        if self.member:
            return f"{self.member}-"
        return f"p{self.index}-" if self.count > 1 else ""

    def of(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of a list that all processes have alike; a member's is the whole."""
        if self.member:
            return list(items)
        return list(items[self.index :: self.count])

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Shard:
        """The process that torchrun (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`) or SLURM started this as.

        Of SLURM: `SLURM_PROCID`, `SLURM_NTASKS` and `SLURM_LOCALID`. A batch script itself has
        these too without being one of the tasks; it counts as a single process, and what `srun`
        starts from it does not.
        """
        if "RANK" in environment and "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        elif (
            "SLURM_PROCID" in environment
            and "SLURM_NTASKS" in environment
            and ("SLURM_STEP_ID" in environment or "SLURM_JOB_ID" not in environment)
        ):
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        else:
            return cls()
        index, count, local = (_number(environment, name) for name in names)
        return cls(index, count, local)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "0")
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name} must be a whole number, got '{value}'") from None
