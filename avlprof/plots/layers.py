"""What one or several policies do in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlprof.errors import UserError
from avlprof.plots.style import INK, MODALITY_COLOURS, SOFT, layer_axis, new_figure, percent_axis, theme
from avlprof.policy import Policy, acts_on, broadcast

COLUMNS = 3
READ_WHOLE = "Kept in memory and read at every step"
STORED, COMPUTED, SPOKEN = "#9CC7E4", MODALITY_COLOURS["vision"], MODALITY_COLOURS["text"]
HEADS, HEAD = "Each KV head", INK


@dataclass(frozen=True)
class PolicyPanel:
    """One policy by layer.

    `keep` and `compute` are shares of the vision tokens (of the whole prompt when `joint`).
    `text` is in tokens, or a share of the text when `text_share`; None means all text stays. `picked` says
    when the core is picked anew, and is empty where it never is. `heads` are
    shares of the vision tokens by layer and KV head where the policy sets them (`head_shares`), of which
    each head is sure of the part `head_floor`. Where pictures are made smaller, `shown` is the share of their
    tokens that the prompt has, of which all shares are.
    """

    name: str
    keep: tuple[float, ...]
    compute: tuple[float, ...]
    joint: bool
    text: tuple[float, ...] | None
    text_share: bool
    picked: str
    heads: tuple[tuple[float, ...], ...] | None = None
    head_floor: float = 1.0
    shown: float | None = None


@dataclass(frozen=True)
class PolicyInfo:
    """What `policy_layers` draws: a column a policy, all with the same number of layers.

    `scalar` says that the one layer drawn stands for every layer. `governed` are the layers that are
    drawn, where the model has others too, which policies leave as they are; None means all.
    """

    layers: int
    panels: tuple[PolicyPanel, ...]
    scalar: bool = False
    governed: tuple[int, ...] | None = None

    @property
    def drawn(self) -> list[int]:
        """The layers that have bars."""
        return list(range(self.layers) if self.governed is None else self.governed)


def policy_layers_info(
    policies: Policy | Sequence[Policy],
    layers: int | None = None,
    governed: tuple[int, ...] | None = None,
) -> PolicyInfo:
    """Ratios and text windows by layer.

    Args:
        policies: one or several.
        layers: layers of the model; by default what the policies are written for (1 when all
            of them hold one scalar for every layer).
        governed: layers that policies act on, where there are others too; by default what the first
            policy's provenance says.

    Raises:
        UserError: there is no policy, or the policies are for models of different depth.
    """
    policies = [policies] if isinstance(policies, Policy) else list(policies)
    if not policies:
        raise UserError("figure 'policy by layer' needs at least one policy, got none")
    scalar = layers is None and all(policy.layers is None for policy in policies)
    if layers is None:
        layers = next((policy.layers for policy in policies if policy.layers), 1)
    for policy in policies:
        policy.check_layers(layers)
    own = governed or next((acts_on(policy) for policy in policies if acts_on(policy)), None)
    own = None if own is None or scalar or max(own) >= layers else own
    return PolicyInfo(layers, tuple(_panel(policy, layers) for policy in policies), scalar, own)


def policy_layers(
    policies: Policy | Sequence[Policy] | PolicyInfo,
    layers: int | None = None,
    governed: tuple[int, ...] | None = None,
) -> Figure:
    """Bars of stored and attended vision KV above the text that stays, a column a policy."""
    info = policies if isinstance(policies, PolicyInfo) else policy_layers_info(policies, layers, governed)
    cols = 2 if len(info.panels) == 4 else min(len(info.panels), COLUMNS)
    bands = math.ceil(len(info.panels) / cols)
    with theme():
        spoken = any(panel.text is not None for panel in info.panels)
        size = (max(9.0, 1.2 + 3.9 * cols), (6.4 if spoken else 4.6) * bands)
        one = len(info.panels) == 1
        title = (
            f"What policy “{info.panels[0].name}” keeps in each layer" if one else "What each policy keeps"
        )
        notes = [] if spoken or any(panel.joint for panel in info.panels) else ["all text stays"]
        if info.governed is not None:
            notes.append(f"policies act on the {len(info.governed)} layers with bars")
        note = "; ".join(notes)
        figure = new_figure(title, note, size)
        rows = 2 if spoken else 1
        axes = figure.subplots(rows * bands, cols, squeeze=False, height_ratios=[2, 1][:rows] * bands)
        longest, top = _longest_window(info), _top(info)
        for number in range(bands * cols):
            band, col = divmod(number, cols)
            own = [axes[rows * band + row][col] for row in range(rows)]
            if number >= len(info.panels):
                for ax in own:
                    ax.set_axis_off()
                continue
            _draw_vision(info.panels[number], info, own[0], top, named=not one, label=not spoken)
            if spoken:
                _draw_text(info.panels[number], info, own[1], longest)
        cored = any(panel.compute != panel.keep for panel in info.panels)
        named = (
            {"Kept in memory": STORED, "Read at every step": COMPUTED} if cored else {READ_WHOLE: COMPUTED}
        )
        named |= {"Text kept": SPOKEN} if spoken else {}
        handles: list[Any] = [axes[0][0].bar(0, 0, color=colour) for colour in named.values()]
        if any(panel.heads is not None for panel in info.panels):
            named |= {HEADS: HEAD}
            handles += axes[0][0].plot([], [], "_", color=HEAD, markersize=14, markeredgewidth=2.4)
        figure.legend(handles, list(named), loc="outside lower center", ncols=len(named))
        return figure


def _panel(policy: Policy, layers: int) -> PolicyPanel:
    picked = _picked(policy)
    shown = policy.pictures.share if policy.pictures is not None and policy.shrinks else None
    if policy.joint is not None:
        share = broadcast(policy.joint.keep, layers)
        return PolicyPanel(policy.name, share, share, True, None, False, picked, shown=shown)
    text: tuple[float, ...] | None = None
    if policy.text.keep is not None:
        text = broadcast(policy.text.keep, layers)
    elif policy.text.window is not None:
        text = tuple(float(window) for window in broadcast(policy.text.window, layers))
    shared = policy.text.keep is not None
    keep, heads = policy.keep(layers), None
    if policy.head_shares is not None:
        heads = tuple(
            tuple(min(kept * share, 1.0) for share in own)
            for kept, own in zip(keep, policy.head_shares, strict=True)
        )
    core, part = policy.compute(layers), policy.head_floor
    return PolicyPanel(policy.name, keep, core, False, text, shared, picked, heads, part, shown)


def _picked(policy: Policy) -> str:
    """When a core is picked anew, and how many layers lead the others."""
    if not policy.picks:
        return ""
    every = policy.refresh_interval
    when = f"every {every} steps" if every > 1 else "at every step"
    if policy.triggered:
        when = f"on a fall of {policy.refresh_margin:g}"
    leads = policy.refresh_layers or ()
    led = f"\nled by {len(leads)} layer{'s' if len(leads) > 1 else ''}" if leads else ""
    return f"core re-chosen {when}{led}"


def _longest_window(info: PolicyInfo) -> float:
    windows = [max(panel.text) for panel in info.panels if panel.text and not panel.text_share]
    return max(windows, default=1.0)


def _top(info: PolicyInfo) -> float:
    """End of the axis of shares, one for all panels: small shares fill it as well."""
    shares = [panel.keep[layer] for panel in info.panels for layer in info.drawn]
    shares += [share for panel in info.panels if panel.heads for own in panel.heads for share in own]
    most = max(shares)
    return min(math.ceil(most * 1.1 * 10 - 1e-9) / 10 or 0.1, 1.0)


def _draw_vision(
    panel: PolicyPanel, info: PolicyInfo, ax: Axes, top: float, named: bool, label: bool
) -> None:
    where = info.drawn
    kept, read = ([shares[layer] for layer in where] for shares in (panel.keep, panel.compute))
    ax.bar(where, kept, 0.82, color=STORED, linewidth=0)
    ax.bar(where, read, 0.82 if read == kept else 0.5, color=COMPUTED, linewidth=0)
    how = panel.picked if panel.compute != panel.keep else ""
    if panel.heads is not None:
        points = [(layer, share) for layer in where for share in panel.heads[layer]]
        width = max(4.0, min(26.0, 120.0 / len(where)))
        ax.plot(*zip(*points, strict=True), "_", color=HEAD, markersize=width, markeredgewidth=2.4)
        if panel.head_floor < 1:
            how = f"each KV head is sure of {panel.head_floor:.0%} of its share, prompts give the rest"
    ax.set_title(f"{panel.name}\n{how}".strip() if named else how, fontsize=13)
    whose = "Prompt KV" if panel.joint else "Vision KV"
    ax.set_ylabel(
        whose if panel.shown is None else f"{whose} of pictures\nmade smaller, to {panel.shown:.0%}"
    )
    percent_axis(ax, "y", full=False)
    ax.set_ylim(0.0, top)
    _layers(ax, info, label)


def _draw_text(panel: PolicyPanel, info: PolicyInfo, ax: Axes, longest: float) -> None:
    _layers(ax, info)
    if panel.text is None:
        says = "text competes with vision" if panel.joint else "all text stays"
        ax.text(0.5, 0.5, says, transform=ax.transAxes, ha="center", va="center", color=SOFT)
        ax.set_yticks([])
        ax.set_ylabel("Text")
        return
    ax.bar(info.drawn, [panel.text[layer] for layer in info.drawn], 0.82, color=SPOKEN, linewidth=0)
    if panel.text_share:
        ax.set_ylabel("Text KV")
        percent_axis(ax, "y")
    else:
        ax.set_ylabel("Text window\n(tokens)")
        ax.set_ylim(0, longest * 1.1)


def _layers(ax: Axes, info: PolicyInfo, label: bool = True) -> None:
    layer_axis(ax, range(info.layers), label)
    if info.layers == 1:
        ax.set_xlim(-1.2, 1.2)
    if info.scalar:
        ax.set_xticks([0], ["every layer"])
        ax.set_xlabel("Layer" if label else "")
