"""How few vision tokens hold most of each layer's vision attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.analysis.profile import Profile
from avlprof.plots.frames import Array, need, need_vision, samples_note, table
from avlprof.plots.style import SOFT, layer_colours, layer_key, new_figure, percent_axis, theme

