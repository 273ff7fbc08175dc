"""What a layer attended to while decoding."""

from __future__ import annotations

from dataclasses import dataclass

from avlprof.runtime.layout import RowPlan


@dataclass
class Reads:
    """Prompt tokens attended to, summed over rows and steps, save for text that the device counts."""

    steps: int = 0
    refreshes: int = 0
    prompt: float = 0.0
    _usual: int = 0
    _more: int = 0

    def expect(self, plans: list[RowPlan]) -> None:
        """Steps from now on read the system and vision tokens of these plans."""
        self._usual = sum(plan.system + plan.core for plan in plans)
        self._more = sum(plan.vision - plan.core for plan in plans)

    def count(self, text: float, refreshing: bool, score_only: bool) -> None:
        """Note a step that attends to `text` prompt tokens of text beside the expected ones.

        A refresh that only scores reads keys, half the bytes.
        """
        self.steps += 1
        self.refreshes += refreshing
        share = 0.0 if not refreshing else 0.5 if score_only else 1.0
        self.prompt += self._usual + share * self._more + text
